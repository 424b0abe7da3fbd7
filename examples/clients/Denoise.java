import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;

/**
 * Denoises a picture with Java's own client, of Java 11 and later:
 * java examples/clients/Denoise.java http://127.0.0.1:8000 examples/noisy.png restored.png
 */
class Denoise {
    public static void main(String[] arguments) throws Exception {
        String key = System.getenv("KEY");
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(arguments[0] + "/v1/models/mnist/denoise"))
                .header("Content-Type", "image/png")
                .header("Accept", "image/png")
                .POST(HttpRequest.BodyPublishers.ofFile(Path.of(arguments[1])));
        if (key != null) {
            request.header("Authorization", "Bearer " + key);
        }
        var answer = HttpClient.newHttpClient().send(request.build(), BodyHandlers.ofByteArray());
        if (answer.statusCode() != 200) {
            throw new IllegalStateException(new String(answer.body()));
        }
        Files.write(Path.of(arguments[2]), answer.body());
        System.out.println("level " + answer.headers().firstValue("X-Level").orElse("unknown"));
    }
}
