// Where the cells of the experts lie. Pure numbers, in device pixels.

/**
 * Rows of `numRows` layers of `numExperts` in a box: each row has `lines` lines of `columns` cells, as many lines as make
 * the cells most like squares. Edges are rounded by `edge`, so that cells fill the width to the pixel.
 */
export function layoutOf({ width, height, numRows, numExperts, left, right, gap }) {
  const inner = Math.max(1, width - left - right);
  const pitch = height / numRows;
  const rowHeight = Math.max(1, pitch - gap);
  let best = null;
  for (let lines = 1; lines <= Math.min(numExperts, rowHeight); lines++) {
    const columns = Math.ceil(numExperts / lines);
    const cellWidth = inner / columns;
    const cellHeight = rowHeight / lines;
    const unlike = Math.abs(Math.log(cellWidth / cellHeight)) + 0.3 * (1 - numExperts / (lines * columns));
    if (best === null || unlike < best.unlike) best = { lines, columns, cellWidth, cellHeight, unlike };
  }
  return { ...best, left, inner, pitch, rowHeight, numRows, numExperts };
}

/** Box of a cell: x, y, width, height. */
export function cellBox(layout, row, expert) {
  const column = expert % layout.columns;
  const line = Math.floor(expert / layout.columns);
  const top = Math.round(row * layout.pitch);
  const x = layout.left + Math.round(column * layout.cellWidth);
  const y = top + Math.round(line * layout.cellHeight);
  return {
    x,
    y,
    width: layout.left + Math.round((column + 1) * layout.cellWidth) - x,
    height: top + Math.round((line + 1) * layout.cellHeight) - y,
  };
}

/** The cell at a point, or null. A point beside the cells gives the row with `expert` null. */
export function cellAt(layout, x, y) {
  const row = Math.floor(y / layout.pitch);
  if (row < 0 || row >= layout.numRows) return null;
  const column = Math.floor((x - layout.left) / layout.cellWidth);
  const line = Math.floor((y - Math.round(row * layout.pitch)) / layout.cellHeight);
  const expert = line * layout.columns + column;
  const isInside = column >= 0 && column < layout.columns && line < layout.lines && expert < layout.numExperts;
  return { row, expert: isInside ? expert : null };
}

/** How high the grid wants to be, in CSS pixels. */
export function wantedHeight(numRows, numExperts, width) {
  if (numRows === 1) return Math.min(420, Math.max(180, Math.sqrt(numExperts) * 22));
  const perRow = numRows <= 12 ? 40 : numRows <= 24 ? 24 : 12;
  return Math.min(numRows * perRow, Math.max(320, width * 1.3));
}
