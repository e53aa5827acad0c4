// What a picture is to the model: codes over the picture, how likely each was, what else might have stood there.
// A code can be exchanged for another, and the picture is painted and judged again.

import { ask, server } from "./api.js";
import { choice, el, problem, starter, submitsOnEnter } from "./dom.js";
import { fromFile } from "./pictures.js";

const COLOURS = [["probability", "how likely", "Dark where the code was unlikely."],
                 ["gain", "what the words changed", "Green where the words made the code likelier, red where they made it less likely."],
                 ["codes", "which code", "A colour for each code."], ["none", "nothing", "The picture as it is painted."]];
const percent = (p) => p >= 0.001 ? `${(100 * p).toPrecision(3)} %` : p.toExponential(1);
const hue = (code) => (code * 137.508) % 360; // neighbours in number are far in colour

export function tokensView(root) {
  let told = null, picture = null, before = [], at = [0, 0];
  const words = el("input", { type: "text", id: "tokens-words", placeholder: "words it may have been drawn for" });
  const pick = el("input", { type: "file", accept: "image/*", hidden: true, id: "tokens-file",
                             onchange: () => { take([...pick.files]); pick.value = ""; } });
  const book = choice("Book", []), colour = choice("Colour", COLOURS);
  const legend = el("small", {});
  const image = el("img", { alt: "", onload: () => image.classList.toggle("pixels", image.naturalWidth < 200) });
  const cells = el("div.cells", { role: "grid", "aria-label": "Codes of the picture" });
  const board = el("div.board", { hidden: true }, image, cells);
  const side = el("aside", { "aria-live": "polite" });
  const summary = el("p.summary", { role: "status" });
  const undo = el("button.plain", { type: "button", hidden: true, onclick: () => look({ codes: before.pop() }) }, "Take back");

  // source: {picture} or {codes}
  function look(source) {
    pending = source;
    return go.run();
  }

  let pending = null;
  const go = starter("Look", async (signal) => {
    const source = pending ?? (told ? { codes: told.codes } : picture && { picture });
    pending = null;
    if (!source) {
      pick.click();
      return;
    }
    const prompt = words.value.trim();
    told = await ask("v1/mmllm/tokens", { model: server.about.id, ...source, ...(prompt && { prompt }), top: 8 }, signal);
    summary.classList.remove("problem");
    paint();
  }, (error) => { side.replaceChildren(problem(error)); });

  async function take(files) {
    try {
      for (const file of files) picture = typeof file === "string" ? file : await fromFile(file);
    } catch (error) {
      side.replaceChildren(problem(error));
      return;
    }
    before = [];
    told = null;
    if (files.length) await look({ picture });
  }

  function paint() {
    legend.textContent = COLOURS.find(([name]) => name === colour.value)[2];
    const [h, w] = told.grid, chosen = Math.min(Number(book.value) || 0, told.books - 1);
    if (book.select.options.length !== told.books) {
      book.select.replaceChildren(...Array.from({ length: told.books }, (_, i) => el("option", { value: i }, `${i}`)));
      book.select.value = chosen;
    }
    book.root.hidden = told.books === 1;
    undo.hidden = !before.length;
    image.src = told.url;
    image.alt = "the picture, painted from its codes";
    board.hidden = false;
    board.style.setProperty("--h", h);
    board.style.setProperty("--w", w);
    at = [Math.min(at[0], h - 1), Math.min(at[1], w - 1)];
    cells.replaceChildren(...told.codes[chosen].map((row, y) => el("div", { role: "row" }, row.map((code, x) => {
      const cell = el("button.cell", { type: "button", role: "gridcell", tabIndex: y === at[0] && x === at[1] ? 0 : -1,
        "aria-label": `row ${y + 1}, column ${x + 1}: code ${code}, ${percent(told.probability[chosen][y][x])}`,
        title: `${code}: ${percent(told.probability[chosen][y][x])}`, onfocus: () => point(y, x), onclick: () => cell.focus() },
        h * w <= 256 ? String(code) : "");
      tint(cell, chosen, y, x);
      return cell;
    }))));
    const gained = told.bits_without - told.bits;
    summary.textContent = `${h} × ${w} places, ${told.books * h * w} codes of ${told.codebook_size}: ${told.bits.toFixed(1)} bits`
      + (told.without ? ` with the words, ${told.bits_without.toFixed(1)} without: they tell ${gained.toFixed(1)} bits` : "");
    point(...at);
  }

  function tint(cell, m, y, x) {
    const p = told.probability[m][y][x], blank = told.without?.[m][y][x];
    const kind = colour.value === "gain" && blank === undefined ? "none" : colour.value;
    cell.dataset.kind = kind;
    if (kind === "probability") cell.style.setProperty("--p", p);
    if (kind === "codes") cell.style.setProperty("--hue", hue(told.codes[m][y][x]));
    if (kind === "gain") {
      const bits = Math.log2(Math.max(p, 1e-30) / Math.max(blank, 1e-30));
      cell.dataset.sign = bits < 0 ? "less" : "more";
      cell.style.setProperty("--p", Math.min(1, Math.abs(bits) / 4));
    }
  }

  function point(y, x) {
    at = [y, x];
    const m = Number(book.value) || 0, code = told.codes[m][y][x], p = told.probability[m][y][x];
    for (const cell of cells.querySelectorAll(".cell")) cell.tabIndex = -1;
    const cell = cells.children[y].children[x];
    cell.tabIndex = 0;
    cells.querySelector(".at")?.classList.remove("at");
    cell.classList.add("at");
    const others = told.top[m][y][x].map((other, i) => el("li", {}, el("button.other", { type: "button", disabled: other === code,
      title: other === code ? "it stands here" : "Put this code here", onclick: () => exchange(m, y, x, other) },
      el("span", {}, String(other)), bar(told.top_probability[m][y][x][i]), el("span", {}, percent(told.top_probability[m][y][x][i])))));
    side.replaceChildren(el("h3", {}, `Row ${y + 1}, column ${x + 1}`),
      el("dl", {}, el("dt", {}, "code"), el("dd", {}, String(code)), el("dt", {}, "probability"), el("dd", {}, percent(p)),
         told.without && [el("dt", {}, "without words"), el("dd", {}, percent(told.without[m][y][x]))],
         el("dt", {}, "rank"), el("dd", {}, `${told.rank[m][y][x] + 1} of ${told.codebook_size}`)),
      el("h4", {}, "Likeliest here"), el("ol", {}, others));
  }

  function bar(p) {
    const made = el("i.bar");
    made.style.setProperty("--p", p);
    return made;
  }

  function exchange(m, y, x, code) {
    if (go.busy) return;
    before.push(told.codes);
    const codes = structuredClone(told.codes);
    codes[m][y][x] = code;
    look({ codes }).then(() => cells.children[y].children[x].focus());
  }

  cells.addEventListener("keydown", (event) => {
    const [h, w] = told.grid, [y, x] = at;
    const to = { ArrowUp: [y - 1, x], ArrowDown: [y + 1, x], ArrowLeft: [y, x - 1], ArrowRight: [y, x + 1], Home: [y, 0],
                 End: [y, w - 1] }[event.key];
    if (!to || to[0] < 0 || to[1] < 0 || to[0] >= h || to[1] >= w) return;
    event.preventDefault();
    cells.children[to[0]].children[to[1]].focus();
  });
  for (const one of [book, colour]) one.select.addEventListener("change", () => told && paint());
  submitsOnEnter(words, () => go.run());
  const form = el("form.knobs", { onsubmit: (event) => { event.preventDefault(); go.run(); } },
    el("button.drop", { type: "button", onclick: () => pick.click() }, "Choose, drop or paste a picture"), pick,
    el("label", { htmlFor: words.id }, "Words"), words, colour.root, legend, book.root, el("div.line", {}, go.root, undo), summary);
  root.append(form, el("div.look", {}, board, side));
  book.root.hidden = true;
  return {
    focus: () => words.focus(), stop: go.stop, attach: take,
    inspect(url, drawnFor) {
      words.value = drawnFor;
      return take([url]);
    },
  };
}
