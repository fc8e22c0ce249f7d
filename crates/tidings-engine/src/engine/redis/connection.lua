-- Writes or takes over a saved connection, if it is its owner's who asks. A connection is JSON that names its owner first; of
-- one that was lost, the owner is empty.
--
-- KEYS: the connection. ARGV: what to do; the owner who asks; the connection as it is from now on; its time, in milliseconds.
--   save    writes it, unless another one owns it
--   forget  removes it, if the one who asks owns it
--   take    gives it the beginning that is passed in its place, whoever owned it, if it is there and is one
-- Returns what was there before (`take`), or 1; nothing: it was not done.
local known = redis.call('GET', KEYS[1])
local owner = known and string.match(known, '"owner":"([^"]*)"')
if ARGV[1] == 'take' then
  local rest = known and string.find(known, ',"client_id":"', 1, true)
  if not rest then return false end
  redis.call('SET', KEYS[1], ARGV[3] .. string.sub(known, rest), 'PX', ARGV[4])
  return known
end
if known and owner ~= ARGV[2] then return false end
if ARGV[1] == 'forget' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
end
return 1
