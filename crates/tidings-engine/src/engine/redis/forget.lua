-- Lets go of what a stream keeps, if nothing was appended for so long that all of it is too old. Its epoch and offset stay.
--
-- KEYS: the stream. ARGV: now, and how old is too old, in seconds. Returns whether anything was let go of.
local key = KEYS[1]
local known = redis.call('HMGET', key, 'o', 'a', 'l', 'c')
local offset, at = known[1], tonumber(known[2])
if not offset or not at or at + tonumber(ARGV[2]) >= tonumber(ARGV[1]) then return 0 end
if known[3] == offset and not known[4] then return 0 end
for _, field in ipairs(redis.call('HKEYS', key)) do
  if string.find(field, '^%d') or string.sub(field, 1, 1) == '#' then redis.call('HDEL', key, field) end
end
redis.call('HDEL', key, 'k', 'c', 's')
redis.call('HSET', key, 'l', offset, 'b', 0, 'z', offset)
return 1
