// Denoises a picture with Go's own client:
//
//	go run examples/clients/denoise.go http://127.0.0.1:8000 examples/noisy.png restored.png
package main

import (
	"bytes"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
)

func main() {
	url, from, to := os.Args[1], os.Args[2], os.Args[3]
	picture, err := os.ReadFile(from)
	if err != nil {
		log.Fatal(err)
	}
	request, err := http.NewRequest("POST", url+"/v1/models/mnist/denoise", bytes.NewReader(picture))
	if err != nil {
		log.Fatal(err)
	}
	request.Header.Set("Content-Type", "image/png")
	request.Header.Set("Accept", "image/png")
	if key := os.Getenv("KEY"); key != "" {
		request.Header.Set("Authorization", "Bearer "+key)
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err != nil {
		log.Fatal(err)
	}
	if answer.StatusCode != http.StatusOK {
		log.Fatalf("%s", content)
	}
	if err := os.WriteFile(to, content, 0o644); err != nil {
		log.Fatal(err)
	}
	fmt.Println("level", answer.Header.Get("X-Level"))
}
