-- Stands before the scripts that touch a stream. Returns its epoch and offset. A stream that was not there begins; one that
-- was last written by another server may have lost its end, and branches: a new epoch begins where it stands.
local function life(key, fresh, now)
  local known = redis.call('HMGET', key, 'e', 'o', 'r', 'd')
  local epoch, offset = known[1], tonumber(known[2])
  local server = string.match(redis.call('INFO', 'replication'), 'master_replid:(%x+)')
  local day = math.floor(now / 86400)
  if not epoch then
    epoch, offset = fresh, 0
    redis.call('HSET', key, 'e', epoch, 'o', 0, 'l', 0, 'b', 0, 'r', server, 'd', day)
    redis.call('EXPIRE', key, UNUSED_SECONDS_MAX)
    return epoch, offset
  end
  if known[3] ~= server then
    local former = (redis.call('HGET', key, 'f') or '') .. epoch .. ' ' .. offset .. '\n'
    local _, lines = string.gsub(former, '\n', '')
    if lines > FORMER_EPOCHS_MAX then former = string.gsub(former, '^[^\n]*\n', '') end
    epoch = fresh
    redis.call('HSET', key, 'e', epoch, 'f', former, 'r', server)
  end
  if tonumber(known[4]) ~= day then
    redis.call('HSET', key, 'd', day)
    redis.call('EXPIRE', key, UNUSED_SECONDS_MAX)
  end
  return epoch, offset
end
