"use strict";

// All text comes from `data` and goes into the page through textContent: names are never read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const count = (n) => n.toLocaleString("en-US");
const percent = (after, before) => (before ? `${((100 * after) / before).toFixed(1)}%` : "–");
const change = (before, after) => (before === after ? count(before) : `${count(before)} → ${count(after)}`);
const HEIGHT = 24;

/** Make an element: `children` are elements or text. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of the drawing. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(at("graph").namespaceURI, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
