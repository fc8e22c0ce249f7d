-- Reads a stream behind a known position, or whole.
--
-- KEYS: the stream. ARGV: a new epoch; now, in seconds; the known epoch and offset; whether to make a stream that is not
-- there. Returns nothing (there is none), or its epoch, offset and former epochs, the offset behind which the events begin,
-- the events together, up to which offset everything was too old to be kept, and, unless the events go on behind what is
-- known, the snapshot that comes before them.
local key, fresh, now, known_epoch, known = KEYS[1], ARGV[1], tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
if ARGV[5] ~= '1' and redis.call('EXISTS', key) == 0 then return false end
local epoch, offset = life(key, fresh, now)
local stored = redis.call('HMGET', key, 'l', 'f', 'z')
local from, former = tonumber(stored[1]), stored[2] or ''
local snapshot = false
if epoch == known_epoch and known >= from and known <= offset then
  from = known
else
  snapshot = redis.call('HGET', key, 'k') or ''
end
local events = {}
for start = from + 1, offset, 1000 do
  local fields = {}
  for n = start, math.min(start + 999, offset) do fields[#fields + 1] = n end
  for i, blob in ipairs(redis.call('HMGET', key, unpack(fields))) do
    -- What is not there any more is missing, with everything before it.
    if blob then events[#events + 1] = blob else events, from = {}, start + i - 1 end
  end
end
return {epoch, offset, former, from, table.concat(events), tonumber(stored[3]) or 0, snapshot}
