#!lua name=coeval2

-- How rows, tiles and marks are changed, each in one step. The number in the names is the version of this file together with the
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

-- Expiries are milliseconds since 1970, empty for never.
local function set_row(key, row, expires)
  if expires == '' then
    redis.call('SET', key, row)
  else
    redis.call('SET', key, row, 'PXAT', expires)
  end
end

-- keys: the row. args: the blob, the expiry. The later of two rows is kept, with the larger position, and the expiry of the
-- one that is kept; of the same row twice the later expiry. Answers 1 if the row was replaced.
local function put_row(keys, args)
  local key, new, expires = keys[1], args[1], args[2]
  local old = redis.call('GET', key)
  if not old then
    set_row(key, new, expires)
    return 1
  end
  if #old < 25 then
    return redis.error_reply('COEVALCORRUPT a row of ' .. #old .. ' bytes, the shortest has 25')
  end
  local newer = later(new, old, 26)
  local new_position, old_position = string.sub(new, 2, 17), string.sub(old, 2, 17)
  local advance = later(new_position, old_position, 1)
  local kept = newer and new or old
  if newer ~= advance then
    local position = advance and new_position or old_position
    kept = string.sub(kept, 1, 1) .. position .. string.sub(kept, 18)
  end
  if newer then
    set_row(key, kept, expires)
    return 1
  end
  if advance then
    redis.call('SET', key, kept, 'KEEPTTL')
  end
  if #new == #old and string.sub(new, 26) == string.sub(old, 26) then
    if expires == '' then
      redis.call('PERSIST', key)
    else
      -- A key without an expiry is later than all others here, too.
      redis.call('PEXPIREAT', key, expires, 'GT')
    end
  end
  return 0
end

-- keys: the entity. args: the position, the epoch, the expiry, the number of tiles to set, field and value of each, the
-- fields to remove. Answers 1 if the position was after the stored one, else nothing has changed.
local function put_tiles(keys, args)
  local key, position, epoch, expires, count = keys[1], args[1], args[2], args[3], tonumber(args[4])
  local old = redis.call('HGET', key, 'h')
  if old then
    if #old ~= 16 and #old ~= 24 then
      return redis.error_reply('COEVALCORRUPT a header of ' .. #old .. ' bytes, it should have 16 or 24')
    end
    local newest = #old == 24 and string.sub(old, 17) or string.rep('\0', 8)
    if later(newest, epoch, 1) then
      local digits = string.gsub(newest, '.', function(byte) return string.format('%02x', string.byte(byte)) end)
      return redis.error_reply('COEVALFENCED ' .. digits)
    end
    if not later(position, string.sub(old, 1, 16), 1) then
      return 0
    end
  end
  -- As few commands as can be: the usual write is one. Lua takes some thousand arguments at once.
  local last = 4 + 2 * count
  redis.call('HSET', key, 'h', position .. epoch, unpack(args, 5, math.min(last, 2004)))
  for at = 2005, last, 2000 do
    redis.call('HSET', key, unpack(args, at, math.min(last, at + 1999)))
  end
  for at = last + 1, #args, 2000 do
    redis.call('HDEL', key, unpack(args, at, math.min(#args, at + 1999)))
  end
  if expires == '' then
    if old then
      redis.call('PERSIST', key)
    end
  elseif not old or redis.call('PEXPIRETIME', key) < tonumber(expires) then
    redis.call('PEXPIREAT', key, expires)
  end
  return 1
end

-- keys: the mark. args: a position. Answers 1 if it is after the stored one, which it then replaces.
local function put_mark(keys, args)
  local old = redis.call('GET', keys[1])
  if old and #old ~= 16 then
    return redis.error_reply('COEVALCORRUPT a mark of ' .. #old .. ' bytes, it should have 16')
  end
  if old and not later(args[1], old, 1) then
    return 0
  end
  redis.call('SET', keys[1], args[1])
  return 1
end

-- keys: the epoch of a writer. args: a candidate. Remembers it if it is after the stored one, else the number after that
-- one, and answers what it remembers.
local function claim(keys, args)
  local epoch, old = args[1], redis.call('GET', keys[1])
  if old and #old ~= 8 then
    return redis.error_reply('COEVALCORRUPT an epoch of ' .. #old .. ' bytes, it should have 8')
  end
  if old and not later(epoch, old, 1) then
    local at = 8
    while at > 0 and string.byte(old, at) == 255 do
      at = at - 1
    end
    if at == 0 then
      return redis.error_reply('COEVALNOEPOCH')
    end
    epoch = string.sub(old, 1, at - 1) .. string.char(string.byte(old, at) + 1) .. string.rep('\0', 8 - at)
  end
  redis.call('SET', keys[1], epoch)
  return epoch
end

redis.register_function('coeval2_row', put_row)
redis.register_function('coeval2_tiles', put_tiles)
redis.register_function('coeval2_mark', put_mark)
redis.register_function('coeval2_claim', claim)
