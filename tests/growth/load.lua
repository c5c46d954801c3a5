-- One request over and over. GROWTH_BODY is its body, GROWTH_KEY the virtual key.
wrk.method = "POST"
wrk.body = os.getenv("GROWTH_BODY")
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("GROWTH_KEY")

-- One line of JSON, the last that wrk prints.
function done(summary)
  local errors = summary.errors
  io.write(string.format('{"requests":%d,"failures":%d}\n', summary.requests,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
