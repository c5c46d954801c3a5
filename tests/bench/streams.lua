-- Streams: each connection asks for one, and is then left alone. They begin spread over
-- BENCH_SPREAD_MS, as those of real customers do. BENCH_BODY and BENCH_HEADERS as in load.lua. When
-- all have ended it says so, so that nobody need wait for the end of wrk's time.
wrk.method = "POST"
wrk.body = io.open(os.getenv("BENCH_BODY"), "rb"):read("*a")
for name, value in os.getenv("BENCH_HEADERS"):gmatch("([^\n:]+): ([^\n]*)") do
  wrk.headers[name] = value
end
local streams = tonumber(os.getenv("BENCH_STREAMS"))
local spread_ms = tonumber(os.getenv("BENCH_SPREAD_MS"))
local an_hour_ms = 3600000

local the_thread = nil
asked, whole, broken = 0, 0, 0 -- globals, which `done` can read out of the thread

function setup(thread)
  the_thread = thread
end

function delay()
  asked = asked + 1
  if asked > streams then
    return an_hour_ms
  end
  return math.floor((asked - 1) * spread_ms / streams)
end

function response(status, headers, body)
  local is_whole = body:sub(-14) == "data: [DONE]\n\n" and not body:find('"error"', 1, true)
  if status == 200 and is_whole then
    whole = whole + 1
  else
    broken = broken + 1
  end
  if whole + broken == streams then
    io.write("all have ended\n")
    io.flush()
  end
end

function done(summary, latency)
  io.write(string.format(
    '{"whole":%d,"broken":%d,"p50":%d,"p90":%d,"p99":%d,"mean":%d,"max":%d}\n',
    the_thread:get("whole"), the_thread:get("broken"),
    latency:percentile(50), latency:percentile(90), latency:percentile(99),
    latency.mean, latency.max))
end
