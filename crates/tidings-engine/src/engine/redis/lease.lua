-- Takes a lease that is free, or renews one's own.
--
-- KEYS: the lease, whose braces let its term be beside it. ARGV: who asks, and for how long, in milliseconds.
-- Returns the term, or 0: somebody else has it.
local holder, term = redis.call('GET', KEYS[1]), KEYS[1] .. ':term'
if holder and holder ~= ARGV[1] then return 0 end
if not holder then redis.call('INCR', term) end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return tonumber(redis.call('GET', term)) or redis.call('INCR', term)
