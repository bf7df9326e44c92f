"use strict"
const data = JSON.parse(document.getElementById("data").textContent)
const body = document.querySelector("#runs tbody")
const heads = [...document.querySelectorAll("#runs thead th")]

// Sorting: numbers from the largest, names alphabetically; a second click reverses it. Rows without a number come last.

const isNumber = (column) => heads[column].classList.contains("number")

function valueOf(row, column) {
  const cell = row.children[column]
  if (!isNumber(column)) return cell.textContent.trim()
  return cell.dataset.value === undefined ? null : Number(cell.dataset.value)
}

function sortBy(column) {
  const first = isNumber(column) ? "descending" : "ascending"
  const second = isNumber(column) ? "ascending" : "descending"
  const order = heads[column].getAttribute("aria-sort") === first ? second : first
  const sign = order === "ascending" ? 1 : -1
  heads.forEach((head) => head.removeAttribute("aria-sort"))
  heads[column].setAttribute("aria-sort", order)
  const rows = [...body.children].map((row) => [valueOf(row, column), row])
  rows.sort(([a], [b]) => {
    if (a === null || b === null) return (a === null) - (b === null)
    return sign * (isNumber(column) ? a - b : a.localeCompare(b, undefined, { numeric: true }))
  })
  body.append(...rows.map(([, row]) => row))
}

// Filtering: show the runs whose rows contain all of the words, in the charts and among the mistakes, too.

function filter() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/)
  const shown = new Set()
  for (const row of body.children) {
    const text = row.textContent.toLowerCase()
    row.hidden = !words.every((word) => text.includes(word))
    if (!row.hidden) shown.add(Number(row.dataset.row))
  }
  for (const part of document.querySelectorAll(".mistakes")) part.hidden = !shown.has(Number(part.dataset.row))
  for (const model of models("GlyphRenderer")) model.visible = shown.has(model.tags[0])
  const n = body.children.length
  document.getElementById("shown").textContent = shown.size === n ? "" : `${shown.size} of ${n}`
}

// Charts

function models(type) {
  return Bokeh.documents.flatMap((chart) => [...chart.all_models].filter((model) => model.type === type))
}

function drawCurves() {
  const [x, y] = ["x", "y"].map((axis) => document.getElementById(axis).value)
  const find = (name) => Bokeh.documents.map((chart) => chart.get_model_by_name(name)).find((model) => model !== null)
  for (const { name, run, places, series } of data.curves) {
    const points = series[y]
    find(name).data = { x: places[points.at][x], y: points.y, run: points.y.map(() => run) }
  }
  find("curves-x").axis_label = data.x[x]
  find("curves-y").axis_label = data.y[y]
  find("curves-hover").tooltips = [["", "@run"], [data.y[y], "@y{0.0000}"], [data.x[x], "@x{0,0.[00]}"]]
}

// Charts are canvases, which do not inherit the page's colors. Black lines are drawn in the color of the text.
function setColors() {
  const style = getComputedStyle(document.documentElement)
  const [text, quiet, line] = ["--text", "--quiet", "--line"].map((name) => style.getPropertyValue(name).trim())
  for (const axis of [...models("LinearAxis"), ...models("LogAxis")]) {
    axis.setv({
      axis_label_text_color: text,
      axis_label_text_font_style: "normal",
      axis_line_color: quiet,
      major_label_text_color: quiet,
      major_tick_line_color: quiet,
      minor_tick_line_color: null,
    })
  }
  for (const grid of models("Grid")) grid.grid_line_color = line
  for (const { glyph, tags } of models("GlyphRenderer")) {
    if (data.black.includes(tags[0])) glyph.setv({ line_color: { value: text }, fill_color: { value: text } })
  }
}

async function start() {
  for (const [name, chart] of Object.entries(data.charts)) await Bokeh.embed.embed_item(chart, name)
  drawCurves()
  setColors()
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", setColors)
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => sortBy(column)))
  document.getElementById("filter").addEventListener("input", filter)
  for (const axis of ["x", "y"]) document.getElementById(axis).addEventListener("change", drawCurves)
  document.body.dataset.ready = "true"
}
start()
