// The server's public API, as a browser calls it: JSON in, JSON or server-sent events out, problems as sentences.

export const server = { about: null, key: sessionStorage.getItem("mmllm.key") ?? "" };

export class Problem extends Error {}

// Ask the reader for a key; `page.js` has the dialog.
let wantKey = async () => false;
export const whenKeyIsWanted = (asks) => { wantKey = asks; };

async function call(path, body, signal) {
  const headers = { ...(body && { "Content-Type": "application/json" }), ...(server.key && { Authorization: `Bearer ${server.key}` }) };
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("the server does not answer: is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401 && await wantKey()) return call(path, body, signal);
  const told = await response.json().catch(() => null);
  throw new Problem(told?.error?.message ?? `the server answered ${response.status}`);
}

export const ask = async (path, body, signal) => (await call(path, body, signal)).json();

// Data of the events of a stream, parsed, until it ends. Lines end in \n; comments and names of events are not needed.
export async function* events(path, body, signal) {
  const response = await call(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem("the connection broke");
    }
    if (piece.done) return;
    const blocks = (rest + piece.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data || data === "[DONE]") continue;
      const told = JSON.parse(data);
      if (told.error) throw new Problem(told.error.message);
      yield told;
    }
  }
}
