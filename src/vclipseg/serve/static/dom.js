// Elements from code; text is always text, never markup.

export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key === "className") element.className = value;
    else if (key in element && typeof value !== "string") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

export function say(text, good = false) {
  const message = document.getElementById("message");
  message.textContent = text || "";
  message.classList.toggle("good", good);
  message.hidden = !text;
}

export const shown = (value, digits = 3) =>
  value === null || value === undefined ? "–" : value.toFixed(digits);

// Buttons of which one is pressed.
export function choice(options, chosen, onChoose) {
  const group = h("span", { className: "group", role: "group" });
  const press = (key) => {
    for (const button of group.children)
      button.setAttribute("aria-pressed", String(button.value === String(key)));
  };
  for (const [key, label] of options) {
    const onclick = () => { press(key); onChoose(key); };
    group.append(h("button", { type: "button", value: String(key), onclick }, label));
  }
  press(chosen);
  group.press = press;
  return group;
}

export function toggle(label, pressed, onToggle, properties = {}) {
  const button = h("button", {
    type: "button",
    ...properties,
    onclick: () => {
      const now = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(now));
      onToggle(now);
    },
  }, label);
  button.setAttribute("aria-pressed", String(pressed));
  return button;
}

// A table whose rows are chosen by mouse or keyboard.
export function table(columns, rows, onChoose) {
  const body = h("tbody");
  const choose = (row) => {
    for (const other of body.children) other.setAttribute("aria-selected", String(other === row));
    row.scrollIntoView({ block: "nearest" });
  };
  for (const { key, cells } of rows) {
    const row = h("tr", { tabindex: "0", "data-key": key },
      cells.map((cell, i) => h("td", { className: columns[i].number ? "number" : "" }, cell)));
    if (onChoose) {
      row.addEventListener("click", () => onChoose(key));
      row.addEventListener("keydown", (event) => event.key === "Enter" && onChoose(key));
    }
    body.append(row);
  }
  const head = columns.map(({ name, number }) => h("th", { className: number ? "number" : "" }, name));
  const element = h("table", {}, h("thead", {}, h("tr", {}, head)), body);
  element.select = (key) => {
    const row = [...body.children].find((child) => child.dataset.key === key);
    if (row) choose(row);
  };
  return element;
}
