"use strict";

// Coloured tokens: pointed at, tapped, or stepped through with the arrow keys.
for (const block of document.querySelectorAll(".words")) {
  const pieces = [...block.children], readout = block.nextElementSibling;
  let at = -1;
  const show = index => {
    if (index < 0 || index >= pieces.length) return;
    pieces[Math.max(at, 0)].classList.remove("here");
    at = index;
    pieces[at].classList.add("here");
    pieces[at].scrollIntoView({block: "nearest"});
    readout.textContent = pieces[at].title;
  };
  const point = event => show(pieces.indexOf(event.target));
  block.addEventListener("click", point);
  block.addEventListener("mouseover", point);
  block.addEventListener("keydown", event => {
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: pieces.length - 1}[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    show(to);
  });
}

// Figures: drawn by plotly.js in the colours of the page, again where these change, and on paper.
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const places = [...document.querySelectorAll(".chart")];
const figures = [...document.querySelectorAll("script.figure")].map(each => each.textContent);
const paper = 680;
function dress(trace, colour) {
  if (trace.type === "heatmap") {
    trace.colorscale = [[0, colour("--low")], [0.5, colour("--middle")], [1, colour("--high")]];
    return;
  }
  const own = colour(typeof trace.meta === "number" ? "--c" + trace.meta % 4 : "--" + trace.meta);
  if (trace.type === "bar") {
    trace.marker = {color: own, line: {color: colour("--back"), width: 1}};
    return;
  }
  trace.line = Object.assign({color: own, width: 2}, trace.line);
  trace.marker = {color: own, size: 5};
  if (trace.fill) trace.fillcolor = own + "26";
  if (trace.stackgroup) trace.fillcolor = own;
}
function draw(index) {
  const place = places[index], figure = JSON.parse(figures[index]);
  const style = getComputedStyle(document.documentElement);
  const colour = name => style.getPropertyValue(name).trim();
  for (const trace of figure.data) dress(trace, colour);
  for (const axis of [figure.layout.xaxis, figure.layout.yaxis])
    Object.assign(axis, {gridcolor: colour("--line"), zerolinecolor: colour("--soft"), linecolor: colour("--line")});
  for (const shape of figure.layout.shapes || []) shape.line.color = colour("--text");
  const heat = figure.data.some(trace => trace.type === "heatmap");
  Object.assign(figure.layout, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: heat ? colour("--gap") : "rgba(0,0,0,0)",
    dragmode: window.matchMedia("(pointer: coarse)").matches ? false : "zoom", margin: {l: 64, r: 20, t: 12, b: 48},
    font: {color: colour("--text"), family: "system-ui, sans-serif", size: 13},
    hoverlabel: {bgcolor: colour("--back"), font: {color: colour("--text")}},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal"},
  });
  if (document.documentElement.classList.contains("paper"))
    Object.assign(figure.layout, {width: paper, height: Number(place.dataset.height)});
  Plotly.react(place, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
// A figure in a section that is folded has no width: it is drawn once the section is opened.
const isSeen = place => !place.closest("details:not([open])");
function drawAll() {
  places.forEach((place, index) => { if (isSeen(place)) draw(index); });
}
function drawFrom(index) {
  if (index >= places.length) return;
  if (isSeen(places[index])) draw(index);
  setTimeout(drawFrom, 0, index + 1);
}
const folded = [...document.querySelectorAll("details.section")];
for (const section of folded)
  section.addEventListener("toggle", () => {
    if (section.open) places.forEach((place, index) => { if (section.contains(place)) draw(index); });
  });
// A link to a section opens it.
function unfold() {
  const target = document.getElementById(location.hash.slice(1)), section = target && target.closest("details.section");
  if (section) section.open = true;
}
addEventListener("hashchange", unfold);
unfold();
let opened = [];
function turn(printing) {
  if (printing) {
    opened = folded.filter(section => section.open);
    for (const section of folded) section.open = true;
    for (const place of places) place.dataset.height = place.clientHeight;
  }
  document.documentElement.classList.toggle("paper", printing);
  drawAll();
  if (!printing) for (const section of folded) section.open = opened.includes(section);
}
drawFrom(0);
dark.addEventListener("change", drawAll);
window.addEventListener("beforeprint", () => turn(true));
window.addEventListener("afterprint", () => turn(false));
