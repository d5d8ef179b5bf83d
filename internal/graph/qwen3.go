package graph

// qwen3 is the dense Qwen3: transformers' Qwen3ForCausalLM.
var qwen3 = architecture{name: "qwen3", neoX: true, headNorm: true}
