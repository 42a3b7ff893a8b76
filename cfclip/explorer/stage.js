// The explorer's pictures: rows of faces, one face large under a wipe, and what mouse, keyboard and files do.
// Widget state: rows [{label, image}], faces [{title, tip, locked, photo}], notes, note_row, before, fixed, busy,
// align, main. Events to the kernel: {event: lock | remove | key | photo | recipe | ping, …}.

const POINTS = ["left eye", "right eye", "tip of the nose", "left corner of the mouth", "right corner of the mouth"]
const KEYS = ["ArrowUp", "ArrowDown", "z", "y", "n"]
const NARROW = 640 // CSS pixels
const MOST_BYTES = 8e6 // of a photo; a Jupyter server drops messages of 10 MB
const PATIENCE = 800 // ms that an idle kernel may take to answer

function make(tag, name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), { className: name }, properties)
  element.append(...children)
  return element
}

function button(name, text, label, call) {
  const element = make("button", name, { type: "button", title: label, onclick: call }, text)
  element.setAttribute("aria-label", label)
  return element
}

function render({ model, el: root }) {
  const end = new AbortController()
  const on = (target, type, call) => target.addEventListener(type, call, { capture: true, signal: end.signal })
  const inside = target => target instanceof Element && panel().contains(target)
  const panel = () => root.closest(".cfx") ?? root
  const get = name => model.get(name)

  let strips = [] // decoded rows
  let serial = 0 // of the rows that are being decoded
  let built = "" // what the grid was built for
  let cells = [] // [row][column] -> canvas
  let large = null // {row, column} of the face that is shown large
  let wiped = 50 // per cent
  let unanswered = null

  const banner = make("div", "cfx-banner", { hidden: true, role: "status" },
    "The kernel is busy with other cells. What you do here happens as soon as they are done.")
  const zoom = make("div", "cfx-zoom", { hidden: true })
  const grid = make("div", "cfx-grid", {}, make("div", "cfx-loading", {}, "drawing the first faces …"))
  root.classList.add("cfx-stage")
  root.append(banner, zoom, grid)

  // ---- the grid ----

  function perRow() {
    const count = get("faces").length
    return root.clientWidth < NARROW ? Math.min(4, count) : count > 8 ? Math.ceil(count / 2) : count
  }

  function build() {
    const count = get("faces").length, width = perRow(), narrow = root.clientWidth < NARROW
    const labels = get("rows").map(row => row.label)
    const key = JSON.stringify([labels, count, width, narrow, get("note_row")])
    if (key === built || !count || !labels.length) return
    built = key
    cells = labels.map(() => [])
    grid.replaceChildren()
    for (let first = 0; first < count; first += width) {
      const columns = [...Array(Math.min(width, count - first)).keys()].map(i => first + i)
      const chunk = make("div", "cfx-chunk" + (narrow ? " cfx-narrow" : ""))
      chunk.style.setProperty("--columns", width)
      chunk.append(make("div", "cfx-label"), ...columns.map(column => make("div", "cfx-head")))
      labels.forEach((label, row) => {
        chunk.append(make("div", "cfx-label", { title: label }, label))
        columns.forEach(column => {
          const open = () => show(large?.row === row && large?.column === column ? null : { row, column })
          const canvas = make("canvas", "cfx-cell", { onclick: open, title: "click: large, with a wipe" })
          cells[row][column] = canvas
          chunk.append(canvas)
        })
        for (let i = columns.length; i < width; i++) chunk.append(make("div", "")) // a chunk may be short
        if (row === get("note_row")) {
          chunk.append(make("div", "cfx-label cfx-spare"), ...columns.map(() => make("div", "cfx-note-cell")))
          for (let i = columns.length; i < width; i++) chunk.append(make("div", ""))
        }
      })
      grid.append(chunk)
    }
    heads()
    notes()
  }

  function heads() {
    const fixed = get("fixed")
    grid.querySelectorAll(".cfx-head").forEach((head, i) => {
      const face = get("faces")[i]
      if (!face) return
      const words = face.tip || (fixed ? face.title : "keep this face when new ones are drawn")
      const lock = button("cfx-face" + (face.locked ? " cfx-on" : ""), (face.locked ? "🔒 " : "") + face.title, words,
        () => { model.send({ event: "lock", face: i }); root.focus() })
      lock.disabled = fixed
      lock.setAttribute("aria-pressed", face.locked)
      head.replaceChildren(lock)
      if (face.photo) {
        const remove = () => { model.send({ event: "remove", face: i }); root.focus() }
        head.append(button("cfx-remove", "×", `remove ${face.title}`, remove))
      }
    })
  }

  function notes() {
    grid.querySelectorAll(".cfx-note-cell").forEach((cell, i) => { cell.textContent = get("notes")[i] ?? "" })
  }

  async function decode() {
    const mine = ++serial
    const decoded = await Promise.all(get("rows").map(row => createImageBitmap(new Blob([row.image]))))
    if (mine !== serial) return
    strips = decoded
    build()
    draw()
  }

  function draw() {
    strips.forEach((strip, row) => cells[row]?.forEach((canvas, column) => paint(canvas, strip.height, row, column)))
    if (large && (large.row >= cells.length || large.column >= get("faces").length)) show(null)
    drawLarge()
  }

  function paint(canvas, size, row, column) {
    const strip = strips[row], side = strip.height
    if (canvas.width !== size) canvas.width = canvas.height = size
    const context = canvas.getContext("2d")
    context.imageSmoothingQuality = "high"
    context.drawImage(strip, column * side, 0, side, side, 0, 0, size, size)
  }

  // ---- one face, large ----

  function show(what) {
    large = what
    zoom.hidden = !large
    if (large) openLarge()
    root.focus()
  }

  function step(by) {
    const count = get("faces").length
    if (large) show({ row: large.row, column: (large.column + by + count) % count })
  }

  function openLarge() {
    const before = make("canvas", "cfx-large"), after = make("canvas", "cfx-large cfx-after")
    const line = make("div", "cfx-wipe-line")
    const range = make("input", "cfx-wipe", { type: "range", min: 0, max: 100, value: wiped })
    range.setAttribute("aria-label", "wipe between before and after")
    const wipe = to => {
      wiped = Math.min(100, Math.max(0, to))
      range.value = wiped
      after.style.clipPath = `inset(0 0 0 ${wiped}%)`
      line.style.left = `${wiped}%`
    }
    const picture = make("div", "cfx-wiped", {}, before, after, line)
    const move = event => {
      const box = picture.getBoundingClientRect()
      wipe(100 * (event.clientX - box.left) / box.width)
    }
    picture.onpointermove = move
    picture.onpointerdown = move
    range.oninput = () => wipe(+range.value)
    const title = make("div", "cfx-zoom-title")
    zoom.replaceChildren(
      button("cfx-turn", "‹", "the face before (←)", () => step(-1)),
      make("div", "cfx-zoom-middle", {}, title, picture, range),
      button("cfx-turn", "›", "the next face (→)", () => step(1)),
      button("cfx-close", "×", "close (Esc)", () => show(null)),
    )
    wipe(wiped)
    drawLarge()
  }

  function drawLarge() {
    const [before, after] = zoom.querySelectorAll("canvas")
    if (!large || !before || !strips.length) return
    const { row, column } = large, from = { row, column, ...get("before") }
    const size = Math.round(Math.min(460, root.clientWidth - 90) * devicePixelRatio)
    paint(before, size, Math.min(from.row, strips.length - 1), from.column)
    paint(after, size, row, column)
    const note = get("notes")[column] ?? ""
    const rows = get("rows")
    zoom.querySelector(".cfx-zoom-title").textContent =
      [`${get("faces")[column].title}`, `${rows[from.row]?.label ?? ""} | ${rows[row].label}`, note].filter(Boolean).join(" · ")
  }

  // ---- photos: chosen, dropped or pasted; aligned by five clicks where the domain's photos are ----

  async function send(file, points = []) {
    model.send({ event: "photo", name: file.name || "photo", points }, undefined, [await file.arrayBuffer()])
  }

  async function take(file) {
    if (!file) return
    if (file.name.endsWith(".json")) return model.send({ event: "recipe", text: await file.text() })
    if (file.size > MOST_BYTES) return model.send({ event: "refused", why: `${file.name} has more than 8 MB: shrink it first` })
    get("align") ? pick(file) : send(file)
  }

  function pick(file) {
    const points = [], close = () => { URL.revokeObjectURL(image.src); show(null) }
    const image = make("img", "cfx-photo", { src: URL.createObjectURL(file), alt: "your photo" })
    const words = make("div", "cfx-zoom-title")
    const picture = make("div", "cfx-wiped cfx-pick", {}, image)
    const update = () => {
      words.textContent = `Click the ${POINTS[points.length]}, left as you see it (${points.length + 1} of 5).`
      picture.querySelectorAll(".cfx-dot").forEach(dot => dot.remove())
      for (const [x, y] of points) {
        const dot = make("div", "cfx-dot")
        dot.style.left = `${100 * x / image.naturalWidth}%`
        dot.style.top = `${100 * y / image.naturalHeight}%`
        picture.append(dot)
      }
    }
    image.onclick = event => {
      const box = image.getBoundingClientRect()
      points.push([
        (event.clientX - box.left) / box.width * image.naturalWidth,
        (event.clientY - box.top) / box.height * image.naturalHeight,
      ])
      if (points.length < 5) return update()
      send(file, points)
      close()
    }
    large = null
    zoom.hidden = false
    zoom.replaceChildren(make("div", "cfx-zoom-middle", {}, words, picture, make("div", "cfx-buttons", {},
      button("cfx-plain", "one back", "take the last point away", () => { points.pop(); update() }),
      button("cfx-plain", "it is aligned already", "use the photo as it is", () => { send(file); close() }),
      button("cfx-plain", "cancel", "use no photo", close))))
    update()
  }

  function listenForFiles() {
    const input = make("input", "", { type: "file", accept: "image/png,image/jpeg,image/webp,.json", hidden: true })
    input.onchange = () => { take(input.files[0]); input.value = "" }
    root.append(make("label", "cfx-file", {}, input, make("span", "cfx-plain", {}, "own photo"),
      " or drop or paste one here · keys: ↑ ↓ strength, z undo, y redo, n new faces, ← → Esc in the large picture"))
    on(document, "dragover", event => { if (inside(event.target)) event.preventDefault() })
    on(document, "drop", event => {
      if (!inside(event.target) || !event.dataTransfer.files.length) return
      event.preventDefault()
      event.stopPropagation()
      take(event.dataTransfer.files[0])
    })
    on(document, "paste", event => {
      const file = [...event.clipboardData?.files ?? []].find(one => one.type.startsWith("image/"))
      if (!file || !panel().contains(document.activeElement)) return
      event.preventDefault()
      take(file)
    })
  }

  // ---- keys, and whether the kernel listens ----

  function key(event) {
    const typing = "input:not([type=range]), textarea, select, [role=slider], [contenteditable=true]"
    if (!inside(event.target) || event.ctrlKey || event.metaKey || event.altKey) return
    if (event.target.closest(typing)) return
    if (large && event.key === "Escape") show(null)
    else if (large && event.key === "ArrowLeft") step(-1)
    else if (large && event.key === "ArrowRight") step(1)
    else if (KEYS.includes(event.key)) model.send({ event: "key", key: event.key })
    else return
    event.preventDefault()
    event.stopPropagation()
  }

  function ping(event) {
    if (unanswered || !inside(event.target)) return
    unanswered = setTimeout(() => { banner.hidden = false; root.classList.add("cfx-old") }, PATIENCE)
    model.send({ event: "ping" })
  }

  function answered() {
    clearTimeout(unanswered)
    unanswered = null
    banner.hidden = true
    root.classList.remove("cfx-old")
  }

  function save(name, type, bytes) {
    const link = make("a", "", { href: URL.createObjectURL(new Blob([bytes], { type })), download: name })
    link.click()
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000)
  }

  if (get("main")) {
    root.tabIndex = 0
    listenForFiles()
    on(document, "keydown", key)
    for (const type of ["input", "click", "keydown"]) on(document, type, ping)
  }

  const seen = new ResizeObserver(() => {
    panel().dataset.lmSuppressShortcuts = "true" // else JupyterLab's single-key shortcuts would move cells
    build()
    draw()
  })
  seen.observe(root)
  const busy = () => root.classList.toggle("cfx-busy", get("busy"))
  const heard = (message, buffers) => {
    if (message.pong) answered()
    if (message.download) save(message.download, message.type, buffers[0])
    if (message.copy) navigator.clipboard.writeText(message.copy)
  }
  const listeners = {
    "change:rows": decode, "change:faces": () => { build(); heads() }, "change:notes": () => { notes(); drawLarge() },
    "change:fixed": heads, "change:busy": busy, "msg:custom": heard,
  }
  for (const [name, call] of Object.entries(listeners)) model.on(name, call)
  busy()
  decode()
  return () => {
    end.abort()
    seen.disconnect()
    clearTimeout(unanswered)
    for (const [name, call] of Object.entries(listeners)) model.off(name, call)
  }
}

export default { render }
