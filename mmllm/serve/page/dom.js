// Elements from calls, and the few controls that every view has.

// el("button.main", { onclick, "aria-label": … }, "Draw") → an element; text stays text.
export function el(name, props = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const made = document.createElement(tag);
  made.classList.add(...classes);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && !key.includes("-") && key !== "list") made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

let count = 0;

// A slider and the number beside it, which go together. → { root, value }
export function slider(label, { min, max, step = 1, value, hint, id = `knob-${count++}` }) {
  const number = el("input", { type: "number", min, max, step, value, "aria-label": `${label}, as a number` });
  const range = el("input", { type: "range", id, min, max, step, value });
  const fill = () => range.style.setProperty("--at", `${(range.value - min) / (max - min || 1) * 100}%`);
  range.addEventListener("input", () => { number.value = range.value; fill(); });
  number.addEventListener("input", () => { range.value = number.value; fill(); });
  number.addEventListener("change", () => { number.value = Math.min(max, Math.max(min, Number(number.value) || 0)); });
  fill();
  return { root: el("div.knob", { title: hint ?? "" }, el("label", { htmlFor: id }, label), range, number),
           get value() { return Math.min(max, Math.max(min, Number(number.value) || 0)); } };
}

// A seed: empty takes a new one each time. → { root, value }
export function seedField() {
  const field = el("input", { type: "number", min: 0, step: 1, placeholder: "new each time", id: `knob-${count++}` });
  const dice = el("button.plain", { type: "button", title: "Another seed", "aria-label": "Another seed",
                                    onclick: () => { field.value = newSeed(); } }, "⚄");
  return { root: el("div.knob.seed", {}, el("label", { htmlFor: field.id }, "Seed"), field, dice),
           get value() { return field.value === "" ? newSeed() : Number(field.value); } };
}

export const newSeed = () => Math.floor(Math.random() * 2 ** 31);

export function choice(label, options) {
  const select = el("select", { id: `knob-${count++}` }, options.map(([value, text]) => el("option", { value }, text)));
  return { root: el("div.knob", {}, el("label", { htmlFor: select.id }, label), select), get value() { return select.value; }, select };
}

// A button that starts work and, while it runs, stops it; Enter in a form only starts. work(signal) is given an AbortSignal.
export function starter(label, work, onproblem) {
  let running = null;
  const button = el("button.main", { type: "submit", onclick: (event) => {
    if (!running) return;
    event.preventDefault(); // the work ends before the click does, and would begin anew
    running.abort();
  } }, label);
  async function run() {
    if (running) return;
    running = new AbortController();
    button.type = "button"; // no longer what Enter presses
    button.textContent = "Stop";
    button.classList.add("stops");
    try {
      await work(running.signal);
    } catch (error) {
      if (error.name !== "AbortError") onproblem(error);
    } finally {
      running = null;
      button.type = "submit";
      button.textContent = label;
      button.classList.remove("stops");
    }
  }
  return { root: button, run, stop: () => running?.abort(), get busy() { return running !== null; } };
}

export const problem = (error) => el("p.problem", { role: "alert" }, error.message);

// Enter in a text area does what its form does; Shift+Enter is a new line.
export function submitsOnEnter(area, submit) {
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    }
  });
}
