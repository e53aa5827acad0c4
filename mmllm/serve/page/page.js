// Four views of one model: which is shown, what is dropped or pasted on them, and light or dark.

import { ask, Problem, server, whenKeyIsWanted } from "./api.js";
import { chatView } from "./chat.js";
import { el, problem } from "./dom.js";
import { drawView } from "./draw.js";
import { guidanceView } from "./guidance.js";
import { filesOf } from "./pictures.js";
import { tokensView } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const BUILD = { chat: chatView, draw: drawView, guidance: guidanceView, tokens: tokensView };
const tabs = [...document.querySelectorAll('[role="tab"]')];
const views = {};
let current = "";

// Views --------------------------------------------------------------------------------------------------------------

function show(name, focus = true) {
  if ($(`tab-${name}`).disabled) return;
  if (!server.about) { // chosen before the server told what it has: `start` goes there
    location.hash = name;
    return;
  }
  current = name;
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
  views[name] ??= BUILD[name]($(name));
  history.replaceState(null, "", `#${name}`);
  if (focus) views[name].focus();
}

for (const tab of tabs) tab.addEventListener("click", () => show(tab.id.slice(4)));
document.querySelector('[role="tablist"]').addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const open = tabs.filter((tab) => !tab.disabled);
  const next = open[(open.indexOf(document.activeElement) + step + open.length) % open.length];
  show(next.id.slice(4), false);
  next.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) views[current]?.stop();
  const number = event.altKey && !event.ctrlKey ? "1234".indexOf(event.key) : -1;
  if (number >= 0 && tabs[number]) {
    event.preventDefault();
    show(tabs[number].id.slice(4));
  }
});

// Pictures from anywhere ---------------------------------------------------------------------------------------------

function attach(files) {
  if (!files.length || !server.about) return;
  if (!views[current].attach) show(server.about.chat ? "chat" : "tokens");
  views[current].attach(files);
}

let over = 0; // enters less leaves: children of the page enter and leave too
const hides = () => { $("drop").hidden = over <= 0; };
addEventListener("dragenter", (event) => { if (event.dataTransfer.types.includes("Files")) { over += 1; hides(); } });
addEventListener("dragleave", (event) => { if (event.dataTransfer.types.includes("Files")) { over -= 1; hides(); } });
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => { event.preventDefault(); over = 0; hides(); attach(filesOf(event.dataTransfer)); }, true);
addEventListener("paste", (event) => {
  if (!filesOf(event.clipboardData).length) return;
  event.preventDefault();
  attach(filesOf(event.clipboardData));
});
document.addEventListener("inspect", ({ detail }) => { show("tokens", false); views.tokens.inspect(detail.url, detail.words); });
document.addEventListener("attach", ({ detail }) => { if (server.about.chat) { show("chat"); views.chat.attach([detail.url]); } });

// Light, dark, keys --------------------------------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
function theme(name) {
  document.documentElement.dataset.theme = name;
  localStorage.setItem("mmllm.theme", name);
  $("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[name];
  $("theme").title = `Theme: ${name}`;
}
theme(THEMES.includes(localStorage.getItem("mmllm.theme")) ? localStorage.getItem("mmllm.theme") : "auto");
$("theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]));

let asking = null; // several requests may want it at once
whenKeyIsWanted(() => {
  asking ??= new Promise((resolve) => {
    const dialog = $("key"), field = dialog.querySelector("input");
    field.value = "";
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      asking = null;
      server.key = field.value.trim();
      sessionStorage.setItem("mmllm.key", server.key);
      resolve(server.key !== "");
    }, { once: true });
  });
  return asking;
});

// Start --------------------------------------------------------------------------------------------------------------

async function start() {
  try {
    server.about = (await ask("v1/models")).data[0];
    if (!server.about.sizes.length) throw new Problem("the visual tokenizer paints none of the model's picture sizes");
  } catch (error) {
    document.querySelector("main").replaceChildren(problem(error), el("button.main", { onclick: () => location.reload() }, "Try again"));
    return;
  }
  const { id, sizes, chat } = server.about;
  $("about").textContent = `${id} · ${sizes.join(", ")}`;
  document.documentElement.dataset.chat = chat;
  if (!chat) {
    $("tab-chat").disabled = true;
    $("tab-chat").title = "This model was not tuned on conversations";
  }
  const wanted = location.hash.slice(1);
  show(wanted in BUILD && !$(`tab-${wanted}`).disabled ? wanted : chat ? "chat" : "draw");
}
start();
