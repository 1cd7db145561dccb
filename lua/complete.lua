-- Turns the holder's reservation into the mark that a send of the key was committed.
--
-- KEYS[1]  where the key stands
-- ARGV[1]  the holder's token
-- ARGV[2]  how long the mark stands, in milliseconds
--
-- Returns 1, or 0 when the holder has lost the reservation: then nothing is touched.
if redis.call('GET', KEYS[1]) ~= 'held:' .. ARGV[1] then
  return 0
end
redis.call('SET', KEYS[1], 'completed', 'PX', ARGV[2])
return 1
