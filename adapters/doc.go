// Package adapters owns the fine-tuned models that can be served: LoRA weights in a directory of their own, each with
// a manifest that says which base model they belong to and how they were trained.
//
// A Registry lists them, counts who is using which, and removes one only when its last user is done:
//
//	registry, err := adapters.Open(ctx, filepath.Join(home, "adapters"), st, adapters.Options{})
//	ref, err := registry.Acquire("ft:smollm2-135m:local:quiz:4hd72kq5")
//	defer ref.Release() // after the stream
package adapters
