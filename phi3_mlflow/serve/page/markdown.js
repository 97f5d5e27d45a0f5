// Markdown as a tree of elements, also while it is still being written.
// Builds nodes and text, never HTML: what a model writes cannot become an element, a script or a request of its own.

import { Lexer } from "./vendor/marked.js";

// A block longer than this is shown as it is: marked needs quadratic time for some hostile ones.
const LIMIT = 20_000; // characters
const DEPTH = 16; // lists and quotes inside each other
const FENCE = /^ {0,3}(`{3,}|~{3,})/;
const DEEP = new RegExp(`^(?:[ \\t]*(?:>|[-*+] |\\d{1,9}[.)] )){${DEPTH + 1}}`, "m");
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0" };

/** The Markdown in one element. Earlier blocks stay as they are while text is added. */
export class Markdown {
  /** @param codeBlock makes (code, language) into a node */
  constructor(element, codeBlock) {
    this.element = element;
    this.codeBlock = codeBlock;
    this.settled = 0; // characters of the text whose nodes can no longer change
    this.tail = []; // the nodes of the rest
    this.links = {}; // reference definitions so far
  }

  /**
   * Shows the text, which begins with the text shown before.
   *
   * @param time milliseconds after which the rest is left to the next call
   * @returns whether all of it is shown
   */
  update(text, time = Infinity) {
    const begun = performance.now();
    text = text.replace(/\r\n?/g, "\n");
    for (const node of this.tail) node.remove();
    this.tail = [];
    while (this.settled < text.length) {
      if (performance.now() - begun > time) return false;
      const window = this.window(text);
      const whole = this.settled + window.length === text.length;
      const blocks = this.lex(window);
      // More text can change the last block, and the one before it where the last is yet to become its next item.
      let stable = blocks.length;
      for (let open = whole ? 2 : 1; stable > 0 && open > 0; stable -= 1) if (blocks[stable - 1].type !== "space") open -= 1;
      if (!whole && stable === 0) {
        this.append([{ type: "raw", raw: window }]);
        this.settled += window.length;
        continue;
      }
      this.append(blocks.slice(0, stable));
      for (const block of blocks.slice(0, stable)) this.settled += block.raw.length;
      if (whole) {
        this.tail = this.append(blocks.slice(stable));
        break;
      }
    }
    return true;
  }

  // What is read in one go: some characters, or a whole block of code, which costs no more than its length.
  window(text) {
    const fence = FENCE.exec(text.slice(this.settled, this.settled + LIMIT))?.[1];
    if (!fence) {
      const cut = text.lastIndexOf("\n", this.settled + LIMIT) + 1;
      const end = text.length - this.settled <= LIMIT ? text.length : cut > this.settled ? cut : this.settled + LIMIT;
      return text.slice(this.settled, end);
    }
    const close = text.indexOf(`\n${fence}`, this.settled + fence.length);
    const after = close < 0 ? -1 : text.indexOf("\n", close + 1);
    if (after < 0) return text.slice(this.settled);
    return text.slice(this.settled, Math.min(text.length, after + 1 + LIMIT));
  }

  lex(source) {
    if (DEEP.test(source)) return [{ type: "raw", raw: source }];
    const lexer = new Lexer({ gfm: true });
    Object.assign(lexer.tokens.links, this.links);
    try {
      const blocks = lexer.lex(source);
      this.links = lexer.tokens.links;
      return blocks;
    } catch {
      // Nested more deeply than the stack is, or a loop that marked breaks off.
      return [{ type: "raw", raw: source }];
    }
  }

  append(blocks) {
    const nodes = blocks.map((block) => this.block(block, 0)).filter(Boolean);
    this.element.append(...nodes);
    return nodes;
  }

  block(token, depth) {
    if (depth > DEPTH) return element("p", [token.raw]);
    const blocks = (tokens) => tokens.map((inner) => this.block(inner, depth + 1)).filter(Boolean);
    switch (token.type) {
      case "space":
      case "def":
        return null;
      case "code":
        return this.codeBlock(token.text, token.lang?.split(/\s/)[0] ?? "");
      case "heading":
        // The page has headings of its own above these.
        return element(`h${Math.min(token.depth + 2, 6)}`, inline(token.tokens));
      case "paragraph":
        return element("p", inline(token.tokens));
      case "text": // the text of a list item
        return element("span", token.tokens ? inline(token.tokens) : [token.text]);
      case "checkbox":
        return document.createTextNode(token.checked ? "☑ " : "☐ ");
      case "hr":
        return element("hr", []);
      case "blockquote":
        return element("blockquote", blocks(token.tokens));
      case "list": {
        const list = element(token.ordered ? "ol" : "ul", token.items.map((item) => element("li", blocks(item.tokens))));
        if (token.ordered) list.start = token.start;
        return list;
      }
      case "table":
        return table(token);
      default: // HTML among it
        return element("p", [token.raw.trimEnd()]);
    }
  }
}

function element(name, children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function table(token) {
  const row = (cells, name) =>
    element("tr", cells.map((cell, index) => {
      const node = element(name, inline(cell.tokens));
      if (token.align[index]) node.style.textAlign = token.align[index];
      return node;
    }));
  const head = element("thead", [row(token.header, "th")]);
  const body = element("tbody", token.rows.map((cells) => row(cells, "td")));
  const scroller = element("div", [element("table", [head, body])]);
  scroller.className = "scroller";
  scroller.tabIndex = 0;
  return scroller;
}

function inline(tokens) {
  return tokens.map((token) => {
    switch (token.type) {
      case "strong":
      case "em":
      case "del":
        return element(token.type, inline(token.tokens));
      case "codespan":
        return element("code", [token.text]);
      case "br":
        return element("br", []);
      case "checkbox":
        return token.checked ? "☑ " : "☐ ";
      case "link":
        return link(token.href, inline(token.tokens));
      case "image": // never fetched: whoever sees the answer decides
        return link(token.href, [`[image: ${token.text || token.href}]`]);
      case "escape":
        return token.text;
      case "text":
        return token.tokens ? element("span", inline(token.tokens)) : decoded(token.text);
      default: // HTML among it
        return token.raw;
    }
  });
}

// A link to a place that a browser opens without running anything; else the text alone.
function link(href, children) {
  const url = URL.parse(href);
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return element("span", children);
  const node = element("a", children);
  node.href = url.href;
  node.title = url.href; // a link's text can claim to be another address
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

function decoded(text) {
  return text.replace(/&(?:#(\d{1,7})|#x([0-9a-f]{1,6})|([a-z]+));/gi, (entity, decimal, hex, name) => {
    if (name) return ENTITIES[name] ?? entity;
    const code = decimal ? Number(decimal) : Number.parseInt(hex, 16);
    return code > 0 && code < 0x110000 ? String.fromCodePoint(code) : entity;
  });
}
