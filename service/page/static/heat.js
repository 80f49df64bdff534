// From a token's log-probability to one of a few shades, and what the shades mean.

/** Probabilities between which the shades of surprise change. */
export const CHANCES = [0.5, 0.2, 0.05, 0.01, 0.001];
/** Factors of a token's probability between which the shades of change do. */
export const FACTORS = [1.1, 1.5, 3];

/**
 * How surprising a token is.
 * @param {number | null} logprob
 * @returns {number | null} 0 (half of the probability or more) to 5
 */
export function surprise(logprob) {
  if (logprob === null) return null;
  return CHANCES.filter((chance) => logprob < Math.log(chance)).length;
}

/**
 * How much less (positive) or more (negative) likely a token became.
 * @param {number | null} logprob
 * @param {number | null | undefined} reference log-probability that it is compared with
 * @returns {number | null} -3 to 3
 */
export function shift(logprob, reference) {
  if (logprob === null || reference === null || reference === undefined) return null;
  const size = FACTORS.filter((factor) => Math.abs(reference - logprob) >= Math.log(factor)).length;
  return logprob > reference && size > 0 ? -size : size;
}

/** @returns {{shade: string, text: string}[]} */
export function surpriseLegend() {
  const percents = CHANCES.map((chance) => `${chance * 100} %`);
  const between = percents.slice(1).map((percent, place) => `${percent} to ${percents[place]}`);
  const texts = [`over ${percents[0]}`, ...between, `under ${percents.at(-1)}`];
  return texts.map((text, place) => ({ shade: `s${place}`, text }));
}

/** @returns {{shade: string, text: string}[]} */
export function shiftLegend() {
  const names = FACTORS.map((factor) => `${factor}×`);
  const steps = names.map((name, place) => (place + 1 < names.length ? `${name} to ${names[place + 1]}` : `${name} and more`));
  const better = steps.map((text, place) => ({ shade: `c-${place + 1}`, text })).reverse();
  const worse = steps.map((text, place) => ({ shade: `c${place + 1}`, text }));
  better[0].text = `likelier ${better[0].text}`;
  worse[worse.length - 1].text = `less likely ${worse[worse.length - 1].text}`;
  return [...better, { shade: "c0", text: "alike" }, ...worse];
}
