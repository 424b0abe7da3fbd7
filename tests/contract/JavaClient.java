import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublisher;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;

/** Java's HttpClient as it is by default, which asks for HTTP/2 with every request; prints what it is answered. */
class JavaClient {
    private static final HttpClient CLIENT = HttpClient.newHttpClient();
    private static String url;

    public static void main(String[] arguments) throws Exception {
        url = arguments[0];
        byte[] row = new byte[8], rows = new byte[8 * 1000], many = new byte[8 << 18];
        ask("get", HttpRequest.newBuilder(URI.create(url + "/v1/models")).build());
        ask("length", post("/v1/decode", BodyPublishers.ofByteArray(row), false));
        ask("rows", post("/v1/decode", BodyPublishers.ofByteArray(rows), false));
        ask("chunked", post("/v1/decode", BodyPublishers.ofInputStream(() -> new ByteArrayInputStream(rows)), false));
        ask("expect", post("/v1/decode", BodyPublishers.ofByteArray(row), true));
        ask("empty", post("/v1/sample", BodyPublishers.noBody(), false));
        ask("unknown", post("/v1/nothing", BodyPublishers.ofByteArray(many), false));
    }

    private static HttpRequest post(String path, BodyPublisher body, boolean expect) {
        return HttpRequest.newBuilder(URI.create(url + path))
                .header("Content-Type", "application/octet-stream")
                .header("Accept", "application/octet-stream")
                .expectContinue(expect).POST(body).build();
    }

    private static void ask(String name, HttpRequest request) throws Exception {
        HttpResponse<byte[]> answer = CLIENT.send(request, HttpResponse.BodyHandlers.ofByteArray());
        System.out.println(name + " " + answer.statusCode() + " " + answer.version() + " " + answer.body().length);
    }
}
