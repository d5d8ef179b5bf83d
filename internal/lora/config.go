package lora

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// Settings are the parts of PEFT's LoraConfig that give an adapter its shape and scale.
type Settings struct {
	R                 int      `json:"r"`
	LoRAAlpha         float64  `json:"lora_alpha"`
	UseRSLoRA         bool     `json:"use_rslora"`
	TargetModules     []string `json:"target_modules"`
	LayersToTransform []int    `json:"layers_to_transform"` // nil: all
}

// ReadSettings reads the settings of a directory that Export wrote. Unlike the manifest's, its alpha is lora_alpha as it
// was asked for, whichever way it scales.
func ReadSettings(dir string) (Settings, error) {
	var s Settings
	data, err := os.ReadFile(filepath.Join(dir, PEFTConfig))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		return Settings{}, fmt.Errorf("settings of the adapter: %w", err)
	}
	return s, nil
}
