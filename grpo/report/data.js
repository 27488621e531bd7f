"use strict";
// Unpacking, numbers as one reads them, and making elements. Text goes into the page as text nodes only, never as markup.

/** The JSON value of a block of this page: base64 of gzip. */
async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

function el(tag, properties, ...children) {
  const element = document.createElement(tag);
  return fill(element, properties, children);
}

function svg(tag, properties, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  return fill(element, properties, children);
}

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([key, v]) => element.style.setProperty(key, v));
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const NONE = "\u2013";
const THIN = "\u202f";

/** Three digits, or all of those before the point. */
function number(value) {
  if (value === null || value === undefined) return NONE;
  const size = Math.abs(value);
  if (size >= 1e6) return (value / 1e6).toFixed(size >= 1e7 ? 1 : 2) + THIN + "M";
  if (size >= 100) return Math.round(value).toLocaleString("en");
  if (size > 0 && size < 0.001) return value.toExponential(1).replace("-", "\u2212");
  return (Number.isInteger(value) ? String(value) : value.toPrecision(3)).replace("-", "\u2212");
}

function percent(value) {
  return value === null || value === undefined ? NONE : (100 * value).toFixed(1) + THIN + "%";
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 59.5) return number(seconds) + THIN + "s";
  const whole = Math.round(seconds);
  const minutes = Math.floor(whole / 60);
  if (minutes < 60) return `${minutes}${THIN}min ${whole % 60}${THIN}s`;
  return `${Math.floor(minutes / 60)}${THIN}h ${minutes % 60}${THIN}min`;
}

function plural(count, word) {
  return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
}

/** Runs have a colour each, which people with any colour vision tell apart (Okabe and Ito); the style sheet has them. */
const colorOf = (index) => `var(--c${index % 8})`;
