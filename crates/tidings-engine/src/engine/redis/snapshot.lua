-- Lets a snapshot stand for the events of the log up to its offset.
--
-- KEYS: the stream. ARGV: the epoch and offset of the snapshot, the snapshot, its size before it was compressed, and the ids
-- that it still knows. Returns 1, or 0: it comes too late.
local key, offset, snapshot = KEYS[1], tonumber(ARGV[2]), ARGV[3]
local known = redis.call('HMGET', key, 'e', 'o', 'l', 'c')
if known[1] ~= ARGV[1] or offset > tonumber(known[2]) or offset <= (tonumber(known[4]) or 0) then return 0 end
local floor = tonumber(known[3])
for start = floor + 1, offset, 1000 do
  local fields = {}
  for n = start, math.min(start + 999, offset) do fields[#fields + 1] = n end
  redis.call('HDEL', key, unpack(fields))
end
floor = math.max(floor, offset)
local bytes = 0
for n = floor + 1, tonumber(known[2]) do bytes = bytes + redis.call('HSTRLEN', key, n) end
redis.call('HSET', key, 'k', snapshot, 'c', offset, 's', ARGV[4], 'l', floor, 'b', bytes)
local kept = {}
for i = 5, #ARGV do kept['#' .. ARGV[i]] = true end
for _, field in ipairs(redis.call('HKEYS', key)) do
  if string.sub(field, 1, 1) == '#' and not kept[field] and tonumber(redis.call('HGET', key, field)) <= offset then
    redis.call('HDEL', key, field)
  end
end
return 1
