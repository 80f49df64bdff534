// Shapes that modules pass to each other; nothing but types.

/**
 * What an answer's one token is, and what might have come instead.
 * @typedef {object} Token
 * @property {string} text what it adds to the text; may be empty
 * @property {number | null} logprob natural logarithm of its probability; null: nothing predicts it
 * @property {Alternative[]} top the likeliest tokens at its place, its own among them if it is one of them
 * @property {number | null} [reference] its log-probability at the full rank
 */

/**
 * @typedef {object} Alternative
 * @property {string} text
 * @property {number} logprob
 */

/**
 * A part of a stream.
 * @typedef {object} Piece
 * @property {string} text
 * @property {Token[]} tokens empty where no log-probabilities were asked for
 * @property {string | null} finish why it ended, in its last part
 */

/**
 * @typedef {object} Scored
 * @property {number} rank
 * @property {number} nll nats per token
 * @property {number} perplexity
 * @property {number} numTokens
 * @property {{text: string, nll: number | null}[]} tokens
 * @property {{dense_perplexity: number, quantized_perplexity: number, delta_to_dense: number, ratio_to_dense: number} | null} probe
 */

/**
 * What `GET /v1/models/{id}` tells.
 * @typedef {object} Card
 * @property {string} id
 * @property {number} max_model_len
 * @property {Artifact} artifact
 * @property {Record<string, number>} backends
 * @property {{backend: string, reason: string, num_layers: number}[]} passed_over
 * @property {Record<string, string>} execution
 */

/**
 * @typedef {object} Artifact
 * @property {string} sha256
 * @property {string} qerve_version
 * @property {string} method
 * @property {string} quantizer
 * @property {string | null} activations
 * @property {string | null} attention
 * @property {string | null} transform
 * @property {number} rank
 * @property {{rank: number, num_layers: number}[]} ranks
 * @property {Scheme[]} schemes
 * @property {number} effective_bits
 * @property {number} dense_bytes
 * @property {{format: string}} [embedding]
 * @property {{format: string}} [head]
 * @property {Record<string, number>} component_bytes
 * @property {Record<string, number>} evaluation
 * @property {boolean} has_probe the server can score the text that the build scored
 */

/**
 * @typedef {object} Scheme
 * @property {number} num_bits
 * @property {number} group_size
 * @property {boolean} is_symmetric
 * @property {string} format
 */

export {};
