// The drawing sheet. Its value is the drawing as a data URL of a PNG file, or empty after Clear.
const canvas = element.querySelector("canvas"), pen = canvas.getContext("2d");
const clear = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, canvas.width, canvas.height); };
const send = (drawing) => { props.value = drawing; trigger("input"); };
const draw = (event) => {
  const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
  const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  pen.lineTo(x + 0.01, y);  // a click makes a dot: a line of length 0 is not drawn
  pen.stroke();
  pen.beginPath();
  pen.moveTo(x, y);
  send(canvas.toDataURL());
};
clear();
Object.assign(pen, {lineWidth: 22, lineCap: "round", lineJoin: "round"});
canvas.addEventListener("pointerdown", (event) => {
  canvas.setPointerCapture(event.pointerId);
  pen.beginPath();
  draw(event);
  draw(event);
});
canvas.addEventListener("pointermove", (event) => { if (canvas.hasPointerCapture(event.pointerId)) draw(event); });
element.querySelector("button").addEventListener("click", () => { clear(); send(""); });
