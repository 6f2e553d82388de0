// What every page needs: its data (base64 of gzip of JSON), numbers and tokens as text, and elements with text in them.
// All of the data is text to show, never markup.

const $ = (id) => document.getElementById(id);

const unpack = async (text) => {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

const numbers = (values) => Float64Array.from(values, (value) => value ?? NaN);

const packed = $("data").textContent;
$("data").remove();
const D = await unpack(packed).catch((error) => {
  document.body.classList.remove("unpacking");
  $("notice").hidden = false;
  $("notice").textContent = `The page's data cannot be unpacked (${error.message}): write the page again.`;
  throw error;
});

const mean = (values) => {
  let sum = 0, count = 0;
  for (const value of values) if (Number.isFinite(value)) { sum += value; count += 1; }
  return count ? sum / count : NaN;
};

// Lower edges of the colour steps: orange where less than half of a vector came through, blue where more did.
const STEPS = [-Infinity, 0, 0.25, 0.5, 0.7, 0.8, 0.9];
const stepOf = (fve) => {
  if (!Number.isFinite(fve)) return -1;
  let step = STEPS.length - 1;
  while (fve < STEPS[step]) step -= 1;
  return step;
};

const number = (value, digits = 3) =>
  Number.isFinite(value) ? value.toFixed(digits).replace("-", "\u2212") : "\u2013";
const count = (value) => value.toLocaleString("en");
const counted = (value, noun) => `${count(value)} ${noun}${value === 1 ? "" : "s"}`;

// A visible form of a token: line breaks, control characters and empty text become symbols.
const visible = (text) => {
  if (text === "") return "\u25e6";
  return text.replace(/[\u0000-\u001f\u007f]/g, (c) =>
    c === "\n" ? "\u21b5\n" : c === "\t" ? "\u21e5\t" : String.fromCharCode(c === "\u007f" ? 0x2421 : 0x2400 + c.charCodeAt(0)));
};
// The same on one line, with spaces as symbols too: for a token that is quoted.
const signs = (text) => visible(text).replace(/ /g, "\u2423").replace(/([\u21b5\u21e5])[\n\t]/g, "$1");
const quoted = (text) => (text === "" ? "part of a character" : `\u201c${signs(text)}\u201d`);

// An element with text in it. Children: elements or strings; strings become text nodes.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};
