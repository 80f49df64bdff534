// Whether two scores of one text differ by more than chance.

/**
 * The ratio of two perplexities of one text. Tokens are compared one by one, so that only what differs adds noise.
 * @param {{nll: number | null}[]} tokens
 * @param {{nll: number | null}[]} reference the same tokens, scored otherwise
 * @returns {{ratio: number, margin: number}} margin: half of a 95 % interval of the ratio, by the tokens' spread
 */
export function comparePerplexity(tokens, reference) {
  /** @type {number[]} */
  const differences = [];
  tokens.forEach((token, at) => {
    const other = reference[at]?.nll ?? null;
    if (token.nll !== null && other !== null) differences.push(token.nll - other);
  });
  const size = differences.length;
  const mean = differences.reduce((sum, value) => sum + value, 0) / size;
  const variance = differences.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (size - 1);
  const ratio = Math.exp(mean);
  return { ratio, margin: 1.96 * Math.sqrt(variance / size) * ratio };
}
