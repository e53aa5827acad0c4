// Pictures for words: one request that fills some figures, row by row as they form.

import { events } from "./api.js";
import { figure } from "./pictures.js";

// → figures, and `ends`: when the stream has.
export function drawing(body, signal, captions = []) {
  const figures = Array.from({ length: body.n }, (_, i) => figure(`${body.prompt}, picture ${i + 1}`,
                                                                  { words: body.prompt, caption: captions[i] }));
  async function fill() {
    const whole = new Set();
    try {
      for await (const told of events("v1/images/generations", { ...body, response_format: "b64_json" }, signal)) {
        const shown = figures[told.index], url = `data:image/png;base64,${told.b64_json}`;
        shown.forms(url, told.row + 1, told.grid[0]);
        if (told.type.endsWith(".completed")) {
          shown.done(url);
          whole.add(told.index);
        }
      }
    } finally {
      figures.forEach((shown, i) => whole.has(i) || shown.fails());
    }
  }
  return { figures, ends: fill() };
}
