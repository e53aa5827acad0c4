// A conversation of text and pictures. `turns` is what the server is sent, whole, each time.

import { events, server } from "./api.js";
import { el, problem, seedField, slider, starter, submitsOnEnter } from "./dom.js";
import { figure, fromFile } from "./pictures.js";

const IDEAS = ["draw a red circle", "draw a green star above a blue square", "draw two yellow rings"];
const LOOK = "describe the picture"; // what a picture without a word asks

export function chatView(root) {
  const { about } = server;
  let turns = [], attached = [];
  const log = el("div.log", { role: "log", "aria-label": "Conversation", tabIndex: 0 });
  const box = el("textarea", { rows: 1, id: "chat-say", placeholder: "Say something, or drop a picture", "aria-label": "Your message" });
  const shelf = el("div.shelf", { hidden: true });
  const pick = el("input", { type: "file", accept: "image/*", multiple: true, hidden: true, id: "chat-file",
                             onchange: () => { attach([...pick.files]); pick.value = ""; } });
  const temperature = slider("Of text", { min: 0, max: 2, step: 0.05, value: 0, hint: "Temperature of text; 0 takes the likeliest" });
  const warmth = slider("Of pictures", { min: 0, max: 2, step: 0.05, value: about.image_temperature, hint: "Temperature of image codes" });
  const guidance = slider("Guidance", { min: 1, max: 15, step: 0.5, value: Math.max(1, about.guidance) });
  const pictures = slider("Pictures", { min: 0, max: 4, value: 1, hint: "Pictures that an answer may hold" });
  const seed = seedField();

  const atEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  function follow(change) {
    const stay = atEnd();
    change();
    if (stay) log.scrollTop = log.scrollHeight;
  }

  async function attach(files) {
    for (const file of files) {
      try {
        show(typeof file === "string" ? file : await fromFile(file));
      } catch (error) {
        follow(() => log.append(problem(error)));
      }
    }
    box.focus();
  }

  function show(url) {
    attached.push(url);
    const drop = el("button.plain", { type: "button", "aria-label": "Take the picture back", onclick: () => {
      attached.splice(attached.indexOf(url), 1);
      card.remove();
      shelf.hidden = !attached.length;
      box.focus();
    } }, "×");
    const card = el("div.card", {}, el("img", { src: url, alt: `attached picture ${attached.length}` }), drop);
    shelf.append(card);
    shelf.hidden = false;
  }

  async function say(signal) {
    const text = box.value.trim() || (attached.length ? LOOK : "");
    if (!text) return;
    const content = [...attached.map((url) => ({ type: "image_url", image_url: { url } })), { type: "text", text }];
    turns.push({ role: "user", content });
    const bubble = el("article.turn.user", { "aria-label": "You" },
                      attached.map((url) => el("img", { src: url, alt: "picture you showed", className: "shown" })), el("p", {}, text));
    log.querySelector(".welcome")?.remove();
    log.append(bubble);
    log.scrollTop = log.scrollHeight;
    box.value = "";
    grow();
    attached = [];
    shelf.replaceChildren();
    shelf.hidden = true;
    await answer(signal);
  }

  async function answer(signal) {
    const body = { model: about.id, messages: turns, temperature: temperature.value, image_temperature: warmth.value,
                   guidance: guidance.value, max_pictures: pictures.value, seed: seed.value, pictures: "parts", previews: true };
    const bubble = el("article.turn.model", { "aria-label": "Model", "aria-busy": "true" }, el("span.waits", {}, "…"));
    const words = turns.at(-1).content.at(-1).text, parts = [], forming = new Map(), began = performance.now();
    let text = null, reason = null;
    follow(() => log.append(bubble));
    try {
      for await (const told of events("v1/chat/completions", body, signal)) {
        const choice = told.choices[0], delta = choice?.delta ?? {};
        follow(() => {
          if (delta.content) {
            if (!text) bubble.append(text = el("p"));
            text.textContent += delta.content;
            if (parts.at(-1)?.type !== "text") parts.push({ type: "text", text: "" });
            parts.at(-1).text += delta.content;
          } else if (delta.picture) {
            const { number, url, row, grid, complete } = delta.picture;
            if (!forming.has(number)) {
              forming.set(number, figure(`picture for: ${words}`, { words }));
              bubble.append(forming.get(number).root);
              text = null;
            }
            forming.get(number).forms(url, row + 1, grid[0]);
            if (complete) {
              forming.get(number).done(url);
              parts.push({ type: "image_url", image_url: { url } });
            }
          }
          reason = choice?.finish_reason ?? reason;
          if (delta.content || delta.picture) bubble.querySelector(".waits")?.remove();
        });
      }
      finished(bubble, parts, reason, body.seed, began);
    } catch (error) {
      for (const shown of forming.values()) if (shown.root.ariaBusy) shown.fails();
      if (error.name === "AbortError") finished(bubble, parts, "stopped", body.seed, began);
      else follow(() => {
        turns.pop(); // it was not answered: the words go back into the box
        if (!box.value) box.value = words;
        grow();
        bubble.replaceChildren(problem(error));
      });
    } finally {
      bubble.removeAttribute("aria-busy");
      bubble.querySelector(".waits")?.remove();
    }
  }

  function finished(bubble, parts, reason, used, began) {
    turns.push({ role: "assistant", content: null, parts });
    const seconds = ((performance.now() - began) / 1000).toFixed(1);
    const why = { length: "cut at its longest", stopped: "stopped" }[reason];
    const again = el("button.plain", { type: "button", title: "Another answer, with another seed", onclick: () => {
      if (go.busy) return;
      turns = turns.slice(0, turns.findIndex((turn) => turn.parts === parts));
      while (bubble.nextSibling) bubble.nextSibling.remove();
      bubble.remove();
      once = answer;
      go.run();
    } }, "Again");
    follow(() => bubble.append(el("footer", {}, el("small", {}, [!parts.length && "said nothing", why, `seed ${used}`, `${seconds} s`]
      .filter(Boolean).join(" · ")), again)));
  }

  let once = null; // what the next start does instead of sending the box
  const go = starter("Send", (signal) => {
    const work = once ?? say;
    once = null;
    return work(signal);
  }, (error) => log.append(problem(error)));

  function grow() {
    box.style.height = "auto";
    box.style.height = `${Math.min(box.scrollHeight, 200)}px`;
  }

  function afresh() {
    go.stop();
    turns = [];
    const ideas = IDEAS.map((idea) => el("button.idea", { type: "button", onclick: () => { box.value = idea; go.run(); } }, idea));
    log.replaceChildren(el("div.welcome", {}, el("h2", {}, "Draw, show, ask"),
      el("p", {}, "Ask for a picture, or show one and ask about it. Drop it anywhere, paste it, or attach it."),
      el("div.ideas", {}, ideas)));
    box.focus();
  }

  const form = el("form.composer", { onsubmit: (event) => { event.preventDefault(); go.run(); } }, shelf,
    el("div.line", {}, el("button.plain", { type: "button", "aria-label": "Attach a picture", title: "Attach a picture",
                                            onclick: () => pick.click() }, "+"), pick, box, go.root),
    el("details", {}, el("summary", {}, "How it answers"), el("div.knobs", {}, el("small", {}, "Temperature"), temperature.root,
       warmth.root, guidance.root, pictures.root, seed.root)),
    el("button.plain.new", { type: "button", onclick: afresh }, "New conversation"));
  box.addEventListener("input", grow);
  submitsOnEnter(box, () => go.busy || form.requestSubmit());
  root.append(log, form);
  afresh();
  return { focus: () => box.focus(), stop: go.stop, attach };
}
