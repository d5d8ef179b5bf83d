package gguf

// KeyValueElements is how many elements the keys and values of one token have, in all layers of a base model.
func KeyValueElements(f *File) (int64, error) {
	c := &checker{f: f}
	c.general()
	c.hyperParameters()
	if c.err != nil {
		return 0, c.err
	}
	var heads int64
	for _, n := range c.kvHeads {
		heads += n
	}
	return heads * (c.headDim + c.valDim), nil
}
