// Guidance side by side: one row of pictures for each strength, the same random numbers in each column.

import { server } from "./api.js";
import { choice, el, problem, seedField, slider, starter, submitsOnEnter } from "./dom.js";
import { drawing } from "./drawing.js";

const numbers = (text, low, high) => [...new Set(text.split(/[\s,;]+/).filter(Boolean).map(Number))]
  .filter((value) => value >= low && value <= high).slice(0, 8);

export function guidanceView(root) {
  const { about } = server;
  const prompt = el("textarea", { rows: 2, id: "guidance-prompt", placeholder: "a green star left of a red ring" });
  const strengths = el("input", { type: "text", id: "guidance-strengths", value: "1, 2, 4, 8", inputMode: "decimal" });
  const across = choice("Across", [["seeds", "different pictures"], ["temperatures", "temperatures"]]);
  const columns = slider("Columns", { min: 1, max: about.max_n, value: Math.min(4, about.max_n), id: "guidance-columns" });
  const warmths = el("input", { type: "text", id: "guidance-temperatures", value: "0, 0.3, 0.7, 1" });
  const warmthsRow = el("div.knob", { hidden: true }, el("label", { htmlFor: warmths.id }, "Temperatures"), warmths);
  const temperature = slider("Temperature", { min: 0, max: 2, step: 0.05, value: about.image_temperature });
  const size = choice("Size", about.sizes.map((name) => [name, name.replace("x", " × ")]));
  const seed = seedField();
  const out = el("div.compare", { "aria-live": "polite" });

  async function compare(signal) {
    const words = prompt.value.trim();
    const rows = numbers(strengths.value, -100, 100);
    if (!words || !rows.length) {
      (words ? strengths : prompt).focus();
      return;
    }
    const byWarmth = across.value === "temperatures";
    const heads = byWarmth ? numbers(warmths.value, 0, 100) : Array.from({ length: columns.value }, (_, i) => i + 1);
    const shared = { model: about.id, prompt: words, size: size.value, seed: seed.value, n: byWarmth ? 1 : heads.length };
    const all = rows.map((guidance) => (byWarmth ? heads : [temperature.value])
      .map((warmth) => drawing({ ...shared, guidance, temperature: warmth }, signal)));
    const table = el("table", {},
      el("caption", {}, `${words} `, el("small", {}, `seed ${shared.seed}`)),
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "guidance"),
                         heads.map((head) => el("th", { scope: "col" }, byWarmth ? `temperature ${head}` : `picture ${head}`)))),
      el("tbody", {}, rows.map((guidance, i) => el("tr", {}, el("th", { scope: "row" }, String(guidance)),
        all[i].flatMap((one) => one.figures).map((shown) => el("td", {}, shown.root))))));
    out.replaceChildren(el("div.wide", {}, table));
    const ended = await Promise.allSettled(all.flat().map((one) => one.ends));
    const failed = ended.find((one) => one.status === "rejected");
    if (failed) throw failed.reason;
  }

  const go = starter("Compare", compare, (error) => out.prepend(problem(error)));
  across.select.addEventListener("change", () => {
    warmthsRow.hidden = across.value !== "temperatures";
    columns.root.hidden = temperature.root.hidden = !warmthsRow.hidden;
  });
  const form = el("form.knobs", { onsubmit: (event) => { event.preventDefault(); go.run(); } },
    el("label", { htmlFor: prompt.id }, "What to draw"), prompt,
    el("div.knob", {}, el("label", { htmlFor: strengths.id }, "Guidance"), strengths),
    across.root, columns.root, warmthsRow, temperature.root, size.root, seed.root, go.root);
  submitsOnEnter(prompt, () => form.requestSubmit());
  root.append(form, out);
  return { focus: () => prompt.focus(), stop: go.stop };
}
