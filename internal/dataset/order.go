package dataset

import "math/rand/v2"

// Order is the sequence of an epoch's rows.
type Order struct {
	n    int
	rows []int32 // nil: the file's order
}

// Order is the sequence of row numbers of an epoch (counted from 0), shuffled by seed: the same for the same arguments
// and number of rows.
func (d *Dataset) Order(seed int64, epoch int) Order {
	o := Order{d.Rows, make([]int32, d.Rows)}
	for i := range o.rows {
		o.rows[i] = int32(i)
	}
	random := rand.New(rand.NewPCG(uint64(seed), uint64(epoch)))
	random.Shuffle(o.n, func(i, j int) { o.rows[i], o.rows[j] = o.rows[j], o.rows[i] })
	return o
}

// Sequence is the file's order.
func (d *Dataset) Sequence() Order { return Order{n: d.Rows} }

// Len is the number of rows.
func (o Order) Len() int { return o.n }

// At returns the row at a position in [0, Len).
func (o Order) At(position int) int {
	if o.rows == nil {
		return position
	}
	return int(o.rows[position])
}
