package graph

// qwen2 is Qwen2 and Qwen2.5: transformers' Qwen2ForCausalLM.
var qwen2 = architecture{name: "qwen2", neoX: true, bias: true}
