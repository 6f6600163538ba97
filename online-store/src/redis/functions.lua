#!lua name=coeval1

-- How rows and tiles are changed, each in one step. The number in the names is the version of this file together with the
-- layout of rows and headers that it knows: raise it when either changes, so that old and new gateways work side by side.

-- Whether the bytes of a from `from` on are greater than those of b. Lua's own < on strings asks the locale.
local function later(a, b, from)
  local shorter = math.min(#a, #b)
  local at = from
  -- Equal stretches are found by comparing strings for equality, which is bytewise, so long rows cost little.
  while at <= shorter do
    local stop = math.min(at + 1023, shorter)
    if string.sub(a, at, stop) ~= string.sub(b, at, stop) then
      while string.byte(a, at) == string.byte(b, at) do
        at = at + 1
      end
      return string.byte(a, at) > string.byte(b, at)
    end
    at = stop + 1
  end
  return #a > #b
end

-- keys: the row. args: the blob. The later of two rows is kept, with the larger position. Answers 1 if the row was replaced.
local function put_row(keys, args)
  local key, new = keys[1], args[1]
  local old = redis.call('GET', key)
  if not old then
    redis.call('SET', key, new)
    return 1
  end
  if #old < 25 then
    return redis.error_reply('COEVALCORRUPT a row of ' .. #old .. ' bytes, the shortest has 25')
  end
  local newer = later(new, old, 26)
  local new_position, old_position = string.sub(new, 2, 17), string.sub(old, 2, 17)
  local advance = later(new_position, old_position, 1)
  if not newer and not advance then
    return 0
  end
  local kept = newer and new or old
  if newer ~= advance then
    local position = advance and new_position or old_position
    kept = string.sub(kept, 1, 1) .. position .. string.sub(kept, 18)
  end
  redis.call('SET', key, kept)
  return newer and 1 or 0
end

-- keys: the entity. args: the position, the number of tiles to set, field and value of each, the fields to remove.
local function put_tiles(keys, args)
  local key, position, count = keys[1], args[1], tonumber(args[2])
  local old = redis.call('HGET', key, 'h')
  if old then
    if #old ~= 16 then
      return redis.error_reply('COEVALCORRUPT a header of ' .. #old .. ' bytes, it should have 16')
    end
    if not later(position, old, 1) then
      return 0
    end
  end
  redis.call('HSET', key, 'h', position)
  for at = 3, 1 + 2 * count, 2 do
    redis.call('HSET', key, args[at], args[at + 1])
  end
  for at = 3 + 2 * count, #args do
    redis.call('HDEL', key, args[at])
  end
  return 1
end

redis.register_function('coeval1_row', put_row)
redis.register_function('coeval1_tiles', put_tiles)
