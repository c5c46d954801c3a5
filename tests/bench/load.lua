-- Whole answers. BENCH_BODY names a file with the request's body, BENCH_KEYS one with a key a line,
-- or none; BENCH_HEADERS are the headers, a line each.
wrk.method = "POST"
wrk.body = io.open(os.getenv("BENCH_BODY"), "rb"):read("*a")
for name, value in os.getenv("BENCH_HEADERS"):gmatch("([^\n:]+): ([^\n]*)") do
  wrk.headers[name] = value
end

-- Many keys take turns, each in a request that was written before the clock ran.
local keys = os.getenv("BENCH_KEYS")
if keys ~= "" then
  local requests, turn = {}, 0
  function init(arguments)
    for key in io.lines(keys) do
      wrk.headers["Authorization"] = "Bearer " .. key
      requests[#requests + 1] = wrk.format()
    end
  end
  function request()
    turn = turn % #requests + 1
    return requests[turn]
  end
end

-- One line of JSON, the last that wrk prints. Times are in microseconds.
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests":%d,"duration":%d,"failures":%d,"p50":%d,"p90":%d,"p99":%d,"mean":%d,"max":%d}\n',
    summary.requests, summary.duration,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99),
    latency.mean, latency.max))
end
