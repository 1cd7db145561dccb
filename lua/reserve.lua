-- Reserves an idempotency key.
--
-- KEYS[1]  where the key stands
-- ARGV[1]  the holder's token
-- ARGV[2]  how long a reservation lasts, in milliseconds
--
-- Returns
--   'reserved'     the holder has it; also when it had it already, so a repeated command finds itself the owner
--   'in_progress'  another holder has it
--   'completed'    a send of this key was committed
local value = redis.call('GET', KEYS[1])
if value == 'completed' then
  return 'completed'
end

local mine = 'held:' .. ARGV[1]
if value and value ~= mine and string.sub(value, 1, 5) == 'held:' then
  -- No reservation outlives its clock, whoever wrote it and whatever expiry it was given.
  local left = redis.call('PTTL', KEYS[1])
  if left < 0 or left > tonumber(ARGV[2]) then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
  end
  return 'in_progress'
end

redis.call('SET', KEYS[1], mine, 'PX', ARGV[2])
return 'reserved'
