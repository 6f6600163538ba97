#!lua name=coevallog1

-- How the event log of a project is changed, each in one step. The number in the names is the version of this file together
-- with the layout of the keys that it knows: raise it when either changes, so that old and new servers work side by side.
--
-- The first key is the log's index, a hash: `format`, `writer` (the token of the process that may write), and for each
-- segment `s<id>` (first sequence and arrival floor) and `e<id>` (where its last record ends). The second key is a segment, a
-- stream whose entry `<offset>-0` holds, in the field `r`, the record at that offset; of one that was changed, `n` is how many
-- bytes it had.

-- Why a writer may not go on; nil if it may.
local function refusal(index, token)
  local writer = redis.call('HGET', index, 'writer')
  if not writer then
    return redis.error_reply('COEVALLOGGONE its keys are gone')
  end
  if writer ~= token then
    return redis.error_reply('COEVALLOGTAKEN another process writes it')
  end
  return nil
end

-- keys: the index. args: the token of the process that writes from now on.
local function claim(keys, args)
  local format = redis.call('HGET', keys[1], 'format')
  if format and format ~= 'coevlog1' then
    return redis.error_reply('COEVALLOGFORMAT ' .. format)
  end
  redis.call('HSET', keys[1], 'format', 'coevlog1', 'writer', args[1])
  return 1
end

-- keys: the index, the segment. args: token, the segment's id, its header, where its first record begins. Answers 0 if it
-- was begun before.
local function begin(keys, args)
  local no = refusal(keys[1], args[1])
  if no then
    return no
  end
  if redis.call('HEXISTS', keys[1], 's' .. args[2]) == 1 then
    return 0
  end
  redis.call('XGROUP', 'CREATE', keys[2], 'appliers', '0', 'MKSTREAM', 'ENTRIESREAD', '0')
  redis.call('HSET', keys[1], 's' .. args[2], args[3], 'e' .. args[2], args[4])
  return 1
end

-- keys: the index, the segment. args: token, the segment's id, where the first of these records begins and where the last
-- one ends, then the offset and the bytes of each. Answers 0 if they are there already.
local function append(keys, args)
  local no = refusal(keys[1], args[1])
  if no then
    return no
  end
  local field = 'e' .. args[2]
  local stop = redis.call('HGET', keys[1], field)
  if stop == args[4] then
    -- Written again, so that the answer waits for the disk.
    redis.call('HSET', keys[1], field, stop)
    return 0
  end
  if stop ~= args[3] then
    return redis.error_reply('COEVALLOGLOST it ends at ' .. (stop or 'nothing') .. ', not at ' .. args[3])
  end
  for at = 5, #args, 2 do
    redis.call('XADD', keys[2], args[at] .. '-0', 'r', args[at + 1])
  end
  redis.call('HSET', keys[1], field, args[4])
  return 1
end

-- keys: the index, the segment. args: token, an offset, a number of entries. All entries up to this one, which are so many,
-- are in the history.
local function done(keys, args)
  local no = refusal(keys[1], args[1])
  if no then
    return no
  end
  if redis.call('EXISTS', keys[2]) == 1 then
    redis.call('XGROUP', 'SETID', keys[2], 'appliers', args[2] .. '-0', 'ENTRIESREAD', args[3])
  end
  return 1
end

-- keys: the index, the segment. args: token, the segment's id.
local function drop(keys, args)
  local no = refusal(keys[1], args[1])
  if no then
    return no
  end
  redis.call('UNLINK', keys[2])
  redis.call('HDEL', keys[1], 's' .. args[2], 'e' .. args[2])
  return 1
end

-- keys: the index, the segment. args: token, the segment's id, where its group stands and after how many entries, then offset,
-- bytes and first length of each entry: they take the place of those that are there. Answers 0 if it is gone.
local function rewrite(keys, args)
  local no = refusal(keys[1], args[1])
  if no then
    return no
  end
  if redis.call('HEXISTS', keys[1], 's' .. args[2]) == 0 then
    return 0
  end
  redis.call('UNLINK', keys[2])
  redis.call('XGROUP', 'CREATE', keys[2], 'appliers', args[3] .. '-0', 'MKSTREAM', 'ENTRIESREAD', args[4])
  for at = 5, #args, 3 do
    redis.call('XADD', keys[2], args[at] .. '-0', 'r', args[at + 1], 'n', args[at + 2])
  end
  return 1
end

-- What makes room, or is needed to come to that, works where there is none.
redis.register_function{function_name = 'coevallog1_claim', callback = claim, flags = {'allow-oom'}}
redis.register_function{function_name = 'coevallog1_begin', callback = begin, flags = {'allow-oom'}}
redis.register_function('coevallog1_append', append)
redis.register_function{function_name = 'coevallog1_done', callback = done, flags = {'allow-oom'}}
redis.register_function('coevallog1_rewrite', rewrite)
redis.register_function{function_name = 'coevallog1_drop', callback = drop, flags = {'allow-oom'}}
