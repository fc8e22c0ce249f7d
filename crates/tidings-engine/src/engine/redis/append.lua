-- Appends events to a stream, in one act: what repeats an id is left out, the rest gets the next offsets, is kept, and is
-- published to whoever follows the stream.
--
-- A stream is one hash, so that a Cluster moves it whole and a full Redis forgets it whole:
--   e, o      its epoch, and the offset of its newest event
--   f         former epochs, a line for each: epoch, space, the last offset that the next one shares with it
--   r         the replication id of the server that appended last
--   l, b      the log holds what came behind offset l, and has b bytes
--   k, c, s   a snapshot of the stream at offset c, and its size before it was compressed
--   q         when somebody was last asked for a snapshot, in seconds
--   d         the day on which it was last used
--   a, z      when something was last appended, in seconds; everything up to offset z was too old to be kept
--   @SOURCE   the number of the last event that came from the source
--   #ID       the offset of the event that has the id
--   OFFSET    an event of the log
--
-- KEYS: the stream. ARGV: a new epoch; now, in seconds; the command to publish with; the source or nothing; and for each
-- event its id or nothing, its number at the source or nothing, and its bytes.
-- Returns the epoch, whether a snapshot is asked for, and the offset of each event; 0: its number was there before.
local key, fresh, now, publish, source = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local epoch, offset = life(key, fresh, now)
local known = redis.call('HMGET', key, 'l', 'b', 's', 'q', '@' .. source)
local floor, bytes = tonumber(known[1]), tonumber(known[2])
local last = known[5] or ''
local reply, payload, fields = {epoch, 0}, {}, {}
local first = offset + 1
for i = 5, #ARGV, 3 do
  local id, number, blob = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  local former = id ~= '' and redis.call('HGET', key, '#' .. id)
  if number ~= '' and number <= last then
    reply[#reply + 1] = 0
  elseif former then
    reply[#reply + 1] = tonumber(former)
  else
    offset = offset + 1
    bytes = bytes + #blob
    payload[#payload + 1] = blob
    reply[#reply + 1] = offset
    redis.call('HSET', key, offset, blob)
    if id ~= '' then redis.call('HSET', key, '#' .. id, offset) end
  end
  if number > last then last = number end
end
-- The log is bounded also if nobody makes snapshots: its beginning is then missing, and whoever reads it sees that.
while offset - floor > LOG_EVENTS_MAX or bytes > LOG_BYTES_MAX do
  floor = floor + 1
  bytes = bytes - redis.call('HSTRLEN', key, floor)
  redis.call('HDEL', key, floor)
end
local changed = {'o', offset, 'b', bytes, 'l', floor, 'a', now}
if source ~= '' then changed[9], changed[10] = '@' .. source, last end
local wanted = bytes >= math.max(SNAPSHOT_BYTES_MIN, tonumber(known[3]) or 0) or offset - floor >= SNAPSHOT_EVENTS
if wanted and now - (tonumber(known[4]) or 0) >= SNAPSHOT_PAUSE then
  reply[2] = 1
  changed[#changed + 1] = 'q'
  changed[#changed + 1] = now
end
redis.call('HSET', key, unpack(changed))
if payload[1] then
  redis.call(publish, key, epoch .. '\n' .. first .. '\n' .. table.concat(payload))
end
return reply
