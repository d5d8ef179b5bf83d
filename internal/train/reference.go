package train

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"

	"github.com/hone-llm/hone/internal/dataset"
)

// references are the log-probabilities of both answers of every row before training: of the base model, or of the
// adapter that training goes on from. The paper's reference is the model that training starts with, and a tuned
// model is one as a whole.
type references [][2]float64

// A file of references is a sequence of blocks, one for each sweepExamples rows: 16 bytes a row (the preferred answer
// first, little-endian float64) and a CRC-32C. It grows while they are computed, so an attempt that ended goes on where it was.
const referenceRowBytes = 16

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// references computes those of a dataset, or takes what an earlier attempt or job with the same content has left in
// the cache. The adapter has the weights to start from.
func (t *trainer) references(ctx context.Context, d *dataset.Dataset) (references, error) {
	key, err := t.referenceKey(d)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(t.cacheDir(), 0o700); err != nil {
		return nil, fmt.Errorf("reference log-probabilities: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(t.cacheDir(), fmt.Sprintf("%x.reference", key[:16])), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("reference log-probabilities: %w", err)
	}
	defer file.Close()
	list, err := readReferences(file, d.Rows)
	if err != nil {
		return nil, fmt.Errorf("reference log-probabilities: %w", err)
	}
	if len(list) == d.Rows {
		return list, nil
	}
	if err := t.info("Computing the reference log-probabilities of %d examples", d.Rows-len(list)); err != nil {
		return nil, err
	}
	adapter := t.lora
	if t.config.StartAdapter == "" {
		adapter = nil
	}
	err = t.sweep(ctx, d.Rows, len(list), fromDataset(d), adapter, func(_ []dataset.Example, block [][]answer) error {
		var data []byte
		for _, answers := range block {
			row := [2]float64{answers[0].logProb, answers[1].logProb}
			list = append(list, row)
			for _, v := range row {
				data = binary.LittleEndian.AppendUint64(data, math.Float64bits(v))
			}
		}
		data = binary.LittleEndian.AppendUint32(data, crc32.Checksum(data, castagnoli))
		_, err := file.Write(data)
		return err
	})
	if err == nil {
		err = file.Sync()
	}
	if err != nil {
		return nil, fmt.Errorf("reference log-probabilities: %w", err)
	}
	return list, nil
}

// readReferences reads the whole blocks of a file and leaves it positioned after them, without the rest.
func readReferences(file *os.File, rows int) (references, error) {
	var list references
	at := int64(0)
	for len(list) < rows {
		n := min(sweepExamples, rows-len(list))
		block := make([]byte, n*referenceRowBytes+4)
		if _, err := file.ReadAt(block, at); err != nil {
			if errors.Is(err, io.EOF) {
				break
			}
			return nil, err
		}
		data := block[:n*referenceRowBytes]
		if crc32.Checksum(data, castagnoli) != binary.LittleEndian.Uint32(block[len(data):]) {
			break
		}
		for i := range n {
			value := func(k int) float64 {
				return math.Float64frombits(binary.LittleEndian.Uint64(data[i*referenceRowBytes+8*k:]))
			}
			list = append(list, [2]float64{value(0), value(1)})
		}
		at += int64(len(block))
	}
	if err := file.Truncate(at); err != nil {
		return nil, err
	}
	_, err := file.Seek(at, io.SeekStart)
	return list, err
}

// referenceKey names references by all that decides them, to the last bit: rows, weights and how they are computed.
func (t *trainer) referenceKey(d *dataset.Dataset) (key [sha256.Size]byte, err error) {
	h := sha256.New()
	m := t.plan.Memory
	fmt.Fprintf(h, "references 1 %s %s %s/%s %d\n", t.config.BaseDigest, m.Device, m.Forward, m.Backward, m.MicroBatchTokens)
	if t.config.StartAdapter != "" {
		if err := binary.Write(h, binary.LittleEndian, t.lora.Parameters); err != nil {
			return key, err
		}
		fmt.Fprintf(h, "%g\n", t.lora.Scale())
	}
	for row := range d.Rows {
		e, err := d.Example(row)
		if err != nil {
			return key, err
		}
		for _, c := range e.Candidates {
			for _, values := range []any{int64(len(c.Tokens)), c.Tokens, c.Weights} {
				if err := binary.Write(h, binary.LittleEndian, values); err != nil {
					return key, err
				}
			}
		}
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}
