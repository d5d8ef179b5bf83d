package graph

// llama is Llama 1 to 3, Mistral, SmolLM and the distillations into them: transformers' LlamaForCausalLM. Its files
// store the rows of q and k so that rotary embedding pairs neighbours.
var llama = architecture{name: "llama", factors: true}
