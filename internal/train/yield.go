package train

// yield is called before every micro-batch.
func (t *trainer) yield() {}
