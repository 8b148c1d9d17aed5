// What of the grid does not change between ticks: the gaps between cells, numbers and kinds of layers.

import { cellBox } from "./grid-layout.js";

const ROUND_FROM = 7; // device pixels of a cell that gets round corners

/** Draw the gaps over where cells will be, and the labels of rows. */
export function drawMask(canvas, layout, layers, colours, ratio) {
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.getElementById("grid"));
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = style.getPropertyValue("--surface");
  const smallest = Math.min(layout.cellWidth, layout.cellHeight);
  if (smallest >= 3) {
    context.fillRect(layout.left, 0, layout.inner, canvas.height);
    context.globalCompositeOperation = "destination-out";
    layers.forEach((layer, row) => punch(context, layout, layer, row, smallest));
    context.globalCompositeOperation = "source-over";
  }
  if (layers.length > 1) drawLabels(context, layout, layers, colours, style, ratio);
  else drawNumbers(context, layout, layers[0], style, ratio);
}

function punch(context, layout, layer, row, smallest) {
  const gap = smallest >= 14 ? 2 : 1;
  context.beginPath();
  for (let expert = 0; expert < layer.experts; expert++) {
    const { x, y, width, height } = cellBox(layout, row, expert);
    if (smallest >= ROUND_FROM) context.roundRect(x, y, width - gap, height - gap, Math.min(4, smallest / 4));
    else context.rect(x, y, width - gap, height - gap);
  }
  context.fill();
}

function drawLabels(context, layout, layers, colours, style, ratio) {
  const isTight = layout.pitch < 11 * ratio;
  const isDense = layout.pitch < 20 * ratio;
  context.font = `${(isDense ? 9 : 11) * ratio}px ${style.fontFamily}`;
  context.textAlign = "right";
  context.textBaseline = "middle";
  layers.forEach((layer, row) => {
    const middle = row * layout.pitch + layout.rowHeight / 2;
    context.fillStyle = colours[layer.kind]?.solid ?? colours.delta.solid;
    const high = layout.rowHeight * (isDense ? 0.75 : 0.55);
    context.beginPath();
    context.roundRect(layout.left - 8 * ratio, middle - high / 2, 3 * ratio, high, 1.5 * ratio);
    context.fill();
    if ((isTight || isDense) && row % 4 !== 3 && !layer.mtp) return;
    context.fillStyle = style.getPropertyValue("--muted");
    context.fillText(layer.mtp ? "MTP" : String(layer.index), layout.left - 12 * ratio, middle);
  });
}

/** Numbers of experts at the first cell of each line of a layer that is shown alone. */
function drawNumbers(context, layout, layer, style, ratio) {
  if (layout.cellWidth < 22 * ratio || layout.cellHeight < 14 * ratio) return;
  context.font = `${9 * ratio}px ${style.fontFamily}`;
  context.textBaseline = "top";
  context.textAlign = "left";
  context.fillStyle = style.getPropertyValue("--muted");
  for (let expert = 0; expert < layer.experts; expert += layout.columns) {
    const { x, y } = cellBox(layout, 0, expert);
    context.fillText(String(expert), x + 3 * ratio, y + 3 * ratio);
  }
}
