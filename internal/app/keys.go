package app

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"

	"github.com/hone-llm/hone/configs"
	"github.com/hone-llm/hone/server"
)

// keys are those of a valid configuration.
func keys(cfg *configs.Config) []server.Key {
	var all []server.Key
	for _, k := range cfg.Keys {
		key := server.Key{Name: k.Name, Scopes: k.Scopes}
		if n, err := hex.Decode(key.Hash[:], []byte(k.SHA256)); err != nil || n != len(key.Hash) {
			panic(fmt.Sprintf("the hash of the key %s, which the configuration let pass: %v", k.Name, err))
		}
		all = append(all, key)
	}
	// A listed key in the environment is a client's, of a command that was run in the same shell: it keeps its scopes.
	hash := sha256.Sum256([]byte(cfg.APIKey))
	if cfg.APIKey != "" && !slices.ContainsFunc(all, func(k server.Key) bool { return k.Hash == hash }) {
		all = append(all, server.Key{Name: "HONE_API_KEY", Hash: hash, Scopes: configs.Scopes()})
	}
	return all
}
