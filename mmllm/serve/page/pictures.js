// Pictures: from files to data: URLs, and as figures that form line by line.

import { Problem } from "./api.js";
import { el } from "./dom.js";

const LARGEST = 8_000_000; // bytes of a file that is sent as it is
const SIDE = 2048; // pixels that a larger one is scaled to

export async function fromFile(file) {
  if (!file.type.startsWith("image/")) throw new Problem(`${file.name || "that"} is no picture`);
  if (file.size > LARGEST) return scaled(file);
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Problem(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function scaled(file) {
  const bitmap = await createImageBitmap(file).catch(() => { throw new Problem(`${file.name} does not decode`); });
  const by = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = el("canvas", { width: Math.round(bitmap.width * by), height: Math.round(bitmap.height * by) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

export const filesOf = (transfer) => [...(transfer?.files ?? [])];

// A figure; `forms(url, rows, of)` shows what there is of it, `done(url)` the whole. words: what it was drawn for.
export function figure(alt, { words = "", caption = "" } = {}) {
  const shown = el("img", { alt, onload: () => shown.classList.toggle("pixels", shown.naturalWidth < 200) });
  const frame = el("div.frame.forming", {}, shown);
  const tools = el("div.tools");
  const root = el("figure.picture", { tabIndex: -1 }, frame, caption && el("figcaption", {}, caption), tools);
  root.setAttribute("aria-busy", "true");
  const tell = (name) => () => root.dispatchEvent(new CustomEvent(name, { bubbles: true, detail: { url: shown.src, words } }));
  return {
    root,
    get url() { return shown.src; },
    forms(url, rows, of) {
      shown.src = url;
      frame.style.setProperty("--formed", rows / of);
      root.dataset.rows = rows;
    },
    done(url) {
      if (url) shown.src = url;
      frame.classList.remove("forming");
      root.removeAttribute("aria-busy");
      tools.replaceChildren(
        el("a.plain", { href: shown.src, download: "picture.png" }, "Save"),
        el("button.plain", { type: "button", onclick: tell("inspect") }, "Tokens"),
        el("button.plain", { type: "button", onclick: tell("attach") }, "To chat"));
    },
    fails() {
      root.removeAttribute("aria-busy");
      frame.classList.add("failed");
    },
  };
}
