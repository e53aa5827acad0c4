// Prompt to pictures, with everything that shapes them.

import { server } from "./api.js";
import { choice, el, problem, seedField, slider, starter, submitsOnEnter } from "./dom.js";
import { drawing } from "./drawing.js";

export function drawView(root) {
  const { about } = server;
  const prompt = el("textarea", { rows: 2, id: "draw-prompt", placeholder: "a red circle above a blue square" });
  const negative = el("input", { type: "text", id: "draw-negative", placeholder: "what to lead away from" });
  const n = slider("Pictures", { min: 1, max: about.max_n, value: Math.min(4, about.max_n), id: "draw-n" });
  const guidance = slider("Guidance", { min: 1, max: 15, step: 0.5, value: Math.max(1, about.guidance), id: "draw-guidance",
                                        hint: "How much more than without the words the picture follows them; 1 is none" });
  const temperature = slider("Temperature", { min: 0, max: 2, step: 0.05, value: about.image_temperature, id: "draw-temperature",
                                              hint: "0 takes the likeliest code at each place" });
  const topK = slider("Top-k", { min: 0, max: 512, value: 0, id: "draw-top-k", hint: "Only the k likeliest codes; 0 keeps all" });
  const size = choice("Size", about.sizes.map((name) => [name, name.replace("x", " × ")]));
  const seed = seedField();
  const runs = el("div.runs", { "aria-live": "polite" });

  async function draw(signal) {
    const words = prompt.value.trim();
    if (!words) {
      prompt.focus();
      return;
    }
    const body = { model: about.id, prompt: words, n: n.value, size: size.value, seed: seed.value, guidance: guidance.value,
                   temperature: temperature.value, top_k: topK.value };
    if (negative.value.trim() && body.guidance !== 1) body.negative_prompt = negative.value.trim();
    const { figures, ends } = drawing(body, signal);
    const said = [`guidance ${body.guidance}`, `temperature ${body.temperature}`, body.top_k ? `top-k ${body.top_k}` : null,
                  `seed ${body.seed}`, body.negative_prompt ? `without ${body.negative_prompt}` : null].filter(Boolean).join(" · ");
    const run = el("article.run", {}, el("header", {}, el("h3", {}, words), el("small", {}, said)),
                   el("div.pictures", {}, figures.map((shown) => shown.root)));
    runs.prepend(run);
    await ends.catch((error) => {
      if (error.name !== "AbortError") run.append(problem(error));
      if (!run.querySelector(".tools a")) run.querySelector(".pictures").remove();
      if (error.name === "AbortError" && !run.querySelector(".pictures")) run.remove();
    });
  }

  const go = starter("Draw", draw, (error) => runs.prepend(problem(error)));
  const form = el("form.knobs", { onsubmit: (event) => { event.preventDefault(); go.run(); } },
    el("label", { htmlFor: prompt.id }, "What to draw"), prompt,
    el("label", { htmlFor: negative.id }, "What not"), negative, el("small.hint", { id: "draw-why" }, "Needs a guidance above 1."),
    n.root, guidance.root, temperature.root, topK.root, size.root, seed.root, go.root);
  negative.setAttribute("aria-describedby", "draw-why");
  const follow = () => { negative.disabled = guidance.value === 1; form.querySelector(".hint").hidden = !negative.disabled; };
  guidance.root.addEventListener("input", follow);
  follow();
  submitsOnEnter(prompt, () => form.requestSubmit());
  root.append(form, runs);
  return { focus: () => prompt.focus(), stop: go.stop };
}
