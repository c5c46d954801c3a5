// The other half of `Program` in tests/e2e/sdk/conftest.py: a JSON job a line in, a JSON line out.

import { createInterface } from "node:readline";

// `cases` has a function by each job's `case`; `describe` tells what an SDK's error says.
export async function serve(cases, describe) {
  for await (const line of createInterface({ input: process.stdin })) {
    const job = JSON.parse(line);
    let answer;
    try {
      answer = { result: await cases[job.case](job) };
    } catch (error) {
      answer = { error: { class: error.constructor.name, text: String(error), ...describe(error) } };
    }
    process.stdout.write(`${JSON.stringify(answer)}\n`);
  }
  // Connections that are kept for later must not keep the process.
  process.exit(0);
}

// Do the same twenty times at once.
export function twentyTimes(work) {
  return Promise.all(Array.from({ length: 20 }, work));
}
