-- Gives the holder's reservation back: nothing was committed.
--
-- KEYS[1]  where the key stands
-- ARGV[1]  the holder's token
--
-- Returns 1, or 0 when the holder has lost the reservation: then nothing is touched.
if redis.call('GET', KEYS[1]) ~= 'held:' .. ARGV[1] then
  return 0
end
redis.call('DEL', KEYS[1])
return 1
