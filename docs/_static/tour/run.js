"use strict";

// Connects the controls of each widget on the page to its picture.
for (const figure of document.querySelectorAll("figure.tour-widget")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const state = Tour.initial(data);
  const picture = figure.querySelector(".tour-picture");
  const status = figure.querySelector("[role=status]");
  const inputs = [...figure.querySelectorAll("input")];
  const width = () => Math.max(320, Math.min(720, picture.clientWidth));

  // Screen readers hear the status when a control comes to rest, not in every frame.
  const show = (quietly = false) => {
    const found = Tour.draw(state, data, width());
    picture.innerHTML = found.svg;
    if (!quietly) status.textContent = found.status;
    for (const input of inputs) {
      if (input.type === "checkbox") {
        input.checked = state[input.name].includes(Number(input.value));
        continue;
      }
      const control = data.controls.find((c) => c.name === input.name);
      const text = control.texts ? control.texts[state[input.name]] : String(state[input.name]);
      input.value = state[input.name];
      input.setAttribute("aria-valuetext", text);
      input.nextElementSibling.value = text;
    }
  };

  const play = figure.querySelector("[name=play]");
  const steps = data.controls.find((c) => c.step);
  let timer = null;
  const stop = () => {
    if (!timer) return;
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };

  for (const input of inputs) {
    input.addEventListener("input", () => {
      stop();
      if (input.type === "checkbox") {
        const chosen = inputs.filter((each) => each.name === input.name && each.checked);
        state[input.name] = chosen.map((each) => Number(each.value));
      } else {
        state[input.name] = Number(input.value);
      }
      show();
    });
  }

  if (play) {
    play.addEventListener("click", () => {
      if (timer) {
        stop();
        return show();
      }
      if (state[steps.name] === steps.max) state[steps.name] = 0;
      show(true);
      play.textContent = "Pause";
      timer = setInterval(() => {
        state[steps.name] = Math.min(state[steps.name] + 1, steps.max);
        const last = state[steps.name] === steps.max;
        if (last) stop();
        show(!last);
      }, 60);
    });
  }

  figure.querySelector("[name=reset]").addEventListener("click", () => {
    stop();
    Object.assign(state, Tour.initial(data));
    show();
  });

  // The picture holds the pointer, because the handle itself is drawn anew.
  const onHandle = (event) => event.target.classList.contains("handle");
  picture.addEventListener("pointerdown", (event) => {
    if (!onHandle(event) || event.button !== 0) return;
    event.preventDefault();
    stop();
    picture.setPointerCapture(event.pointerId);
  });
  // Else a finger on the handle scrolls the page: browsers ignore touch-action inside SVG.
  picture.addEventListener("touchstart", (event) => {
    if (onHandle(event)) event.preventDefault();
  }, { passive: false });
  picture.addEventListener("pointermove", (event) => {
    if (!picture.hasPointerCapture(event.pointerId)) return;
    const shown = picture.firstElementChild.getBoundingClientRect();
    const scale = width() / shown.width;
    const [x, y] = [event.clientX - shown.left, event.clientY - shown.top];
    Object.assign(state, Tour.drag(state, data, width(), x * scale, y * scale));
    show(true);
  });
  picture.addEventListener("lostpointercapture", (event) => {
    if (event.target === picture) show();
  });

  figure.querySelector("form").hidden = false;
  let last = 0;
  const resized = () => {
    if (picture.clientWidth === last) return;
    last = picture.clientWidth;
    show(true);
  };
  window.addEventListener("resize", resized);
  resized();
}
