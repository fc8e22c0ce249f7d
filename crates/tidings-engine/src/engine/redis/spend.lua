-- Spends a resume token, if it is the user's who shows it: in any other hands it stays what it was, and is worth nothing.
--
-- KEYS: the token. ARGV: the user, empty where nobody is asked. The value names the client, in 36 characters, and then its user.
-- Returns the client; nothing: the token is not good.
local value = redis.call('GET', KEYS[1])
if not value or string.sub(value, 37) ~= ARGV[1] then return false end
redis.call('DEL', KEYS[1])
return string.sub(value, 1, 36)
