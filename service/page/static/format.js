// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const NONE = "–";

/**
 * At least two and mostly three significant digits.
 * @param {number | null} value
 * @returns {string}
 */
export function number(value) {
  if (value === null || Number.isNaN(value)) return NONE;
  if (!Number.isFinite(value)) return value < 0 ? "−∞" : "∞";
  const size = Math.abs(value);
  const digits = size >= 100 || size === 0 ? 0 : size >= 10 ? 1 : 2;
  return signed(value.toFixed(digits));
}

/**
 * With a fixed number of digits after the point.
 * @param {number} value
 * @param {number} digits
 * @returns {string}
 */
export function fixed(value, digits) {
  return Number.isFinite(value) ? signed(value.toFixed(digits)) : number(value);
}

/**
 * @param {number} value
 * @param {number} digits
 * @returns {string} with its sign, a plus too
 */
export function change(value, digits) {
  const text = fixed(value, digits);
  return value > 0 ? `+${text}` : text;
}

/**
 * A real minus, and no negative zero.
 * @param {string} text
 * @returns {string}
 */
function signed(text) {
  return /^-0(\.0*)?$/.test(text) ? text.slice(1) : text.replace("-", "−");
}

/**
 * @param {number | null} value
 * @returns {string}
 */
export function bytes(value) {
  if (value === null) return NONE;
  let unit = 0;
  while (value >= 1000 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : number(value)} ${UNITS[unit]}`;
}

/**
 * @param {number | null} seconds
 * @returns {[string, string]} figure and unit
 */
export function duration(seconds) {
  if (seconds === null) return [NONE, ""];
  return seconds < 1 ? [number(seconds * 1000), "ms"] : [number(seconds), "s"];
}

/**
 * @param {number} share 0 to 1
 * @returns {string}
 */
export function percent(share) {
  const value = share * 100;
  if (value > 0 && value < 0.01) return "< 0.01 %";
  return `${fixed(value, value >= 99.95 || value === 0 ? 0 : value >= 10 ? 1 : 2)} %`;
}

/**
 * @param {number} count
 * @param {string} thing in the singular
 * @returns {string}
 */
export function count(count, thing) {
  return `${count.toLocaleString("en")} ${thing}${count === 1 ? "" : "s"}`;
}

/**
 * A token as it can be seen: blanks and line ends have signs.
 * @param {string} text
 * @returns {string}
 */
export function visible(text) {
  if (text === "") return "no text of its own";
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");
}
